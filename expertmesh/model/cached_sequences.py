"""The layout of a step over the KV cache, and causal attention in it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from expertmesh.model import cuda, invariant
from expertmesh.model.arrays import to_torch
from expertmesh.model.cache import BLOCK_TOKENS, KeyValueCache, blocks_of
from expertmesh.model.decoding import fits, token_table
from expertmesh.model.invariant import Picked
from expertmesh.model.rotary import Rotary
from expertmesh.model.sequences import Pattern, Sequences
from expertmesh.model.tiles import Batch, Span, batched, cut


class CachedSequences(Sequences):
    """The layout of a step: rows of many sequences, each behind what is cached of it.

    Args:
        spans: The rows of each sequence, in the order of the step.
        cache: Where keys and values are.
        rotary: Of the model.
        device: Where the step is computed.
    """

    def __init__(self, spans: Sequence[Span], cache: KeyValueCache, rotary: Rotary, device: torch.device) -> None:
        super().__init__(torch.tensor([span.rows for span in spans], device=device), rotary)
        self.cache, self.rotary = cache, rotary
        self._device = device
        self._spans = spans
        self._tiles = cut(spans)
        self._rows = sum(span.rows for span in spans)
        self._batches: dict[tuple[int, int, int], list[Batch]] = {}

    @cached_property
    def positions_T(self) -> Tensor:
        """Position of each token row within its sequence."""
        positions = [np.arange(span.position, span.position + span.rows) for span in self._spans]
        return torch.from_numpy(np.concatenate(positions)).to(self._device)

    @cached_property
    def _place_R(self) -> Tensor:
        blocks = np.concatenate([_blocks_of_rows(span) for span in self._spans])
        return self.cache.places(torch.from_numpy(blocks).to(self._device), self.positions_T % BLOCK_TOKENS)

    def attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKv: Tensor, pattern: Pattern) -> Tensor:
        """Caches the rows' keys and values, and attends to everything before them and themselves; float32."""
        self.cache.write(pattern.layer, self._place_R, k_TKd, v_TKv)
        rows, heads, _ = q_THd.shape
        key_heads = k_TKd.shape[1]
        share = heads // key_heads
        mixed_THv = None
        for batch in self._batched(pattern.window, key_heads, share):
            mixed = self._attended(q_THd, batch, key_heads, pattern)
            if batch.is_whole_step:
                return mixed
            if mixed_THv is None:
                mixed_THv = q_THd.new_empty(rows, *mixed.shape[1:], dtype=torch.float32)
            mixed_THv[batch.inside_rows] = mixed[batch.inside_places]
        assert mixed_THv is not None
        return mixed_THv

    def _attended(self, q_THd: Tensor, batch: Batch, key_heads: int, pattern: Pattern) -> Tensor:
        """What the places of a batch attend to, tile after tile: [N*P, H, v]."""
        n, rows = batch.shape
        _, heads, width = q_THd.shape
        share = heads // key_heads
        q = q_THd if batch.is_whole_step else q_THd[batch.rows]
        q = q.view(n, rows, key_heads, share, width).permute(0, 2, 1, 3, 4).reshape(n, key_heads, rows * share, width)
        keys: Tensor | Picked
        values: Tensor | Picked
        if cuda.serves(q):
            keys, values = self.cache.read(pattern.layer, batch.blocks_NB)
        else:
            keys, values = self.cache.view(pattern.layer, batch.blocks)
        sinks = pattern.sinks_H
        sinks_KM = None if sinks is None else sinks.view(key_heads, 1, share).expand(-1, rows, -1).flatten(1)
        q_NKMd = q.to(self.cache.dtype)
        mixed = invariant.causal_attention(q_NKMd, keys, values, batch.hidden_NBMS, pattern.scale, sinks_KM)
        return mixed.view(n, key_heads, rows, share, -1).permute(0, 2, 1, 3, 4).reshape(n * rows, heads, -1)

    def token_table(self, layer: int) -> Tensor | None:
        """What a `decoding.TokenStep` is told of this step, if it can be one; the cache is prepared for it."""
        if not self._is_token_step:
            return None
        self.cache.prepare(layer, [span.blocks[span.position // BLOCK_TOKENS] for span in self._spans])
        return self._token_table

    @cached_property
    def _is_token_step(self) -> bool:
        most = max(blocks_of(span.position + span.rows) for span in self._spans)
        return all(span.rows == 1 for span in self._spans) and fits(len(self._spans), most)

    @cached_property
    def _token_table(self) -> Tensor:
        places = [(span.position, span.blocks) for span in self._spans]
        return to_torch(token_table(places, BLOCK_TOKENS, self.cache.blocks), self._device)

    def _batched(self, window: int, key_heads: int, share: int) -> list[Batch]:
        """The tiles, batched by their shape; made once, since most layers are alike."""
        key = (window, key_heads, share)
        if key not in self._batches:
            self._batches[key] = [
                Batch(tiles, rows, window, share, self._rows, self._device)
                for rows, tiles in batched(self._tiles, window, key_heads, share)
            ]
        return self._batches[key]


def _blocks_of_rows(span: Span) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    ordinals = np.arange(span.position, span.position + span.rows) // BLOCK_TOKENS
    return np.asarray(span.blocks, np.int64)[ordinals]
