"""The KV cache: keys and values of the tokens before, in blocks, and causal attention over them.

A block holds `BLOCK_TOKENS` tokens of one sequence in every layer, which is also the size in which attention goes over
keys; so a sequence may be computed whole, in chunks or token by token, here or elsewhere, and gives the same bits. Who
may have how many blocks is not decided here; see `serving.leases`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import gcd

import numpy as np
import torch
from torch import Tensor

from expertmesh.model import cuda, invariant
from expertmesh.model.arrays import to_torch
from expertmesh.model.decoding import fits, token_table
from expertmesh.model.invariant import Picked
from expertmesh.model.layers import DTYPES
from expertmesh.model.rotary import Rotary
from expertmesh.model.sequences import Pattern, Sequences
from expertmesh.model.spec import ModelSpec

BLOCK_TOKENS = 128
TILE_ROWS = 64  # rows of one sequence that are attended together
MAX_SCORES = 2**23  # elements of a score tensor, by which long work is cut


def blocks_of(tokens: int) -> int:
    """Blocks that a sequence of so many tokens needs."""
    return -(-tokens // BLOCK_TOKENS)


class KeyValueCache:
    """Keys and values of every layer.

    Args:
        spec: The model.
        blocks: How many blocks there are.
        device: Where they are.
    """

    block_tokens = BLOCK_TOKENS

    def __init__(self, spec: ModelSpec, blocks: int, device: torch.device) -> None:
        heads, key_width, value_width = _shape(spec)
        self.blocks = blocks
        spare = device.type == "cuda"  # one more, behind the others, for rows that only pad a step
        self.dtype = DTYPES[spec.dtype]
        self._is_latent = spec.attention.kind == "latent"
        self._value_width = value_width

        def pool(width: int) -> Tensor:  # zeros, since even what is hidden must be finite
            return torch.zeros(blocks + spare, heads, BLOCK_TOKENS, width, dtype=self.dtype, device=device)

        self._keys = [pool(key_width) for _ in range(spec.layers)]
        self._values = [] if self._is_latent else [pool(value_width) for _ in range(spec.layers)]
        self._stale: list[set[int]] = [set() for _ in range(spec.layers)]

    @staticmethod
    def block_bytes(spec: ModelSpec) -> int:
        """Memory of one block, in all layers."""
        heads, key_width, value_width = _shape(spec)
        width = key_width if spec.attention.kind == "latent" else key_width + value_width
        return spec.layers * heads * BLOCK_TOKENS * width * DTYPES[spec.dtype].itemsize

    def renew(self, blocks: Iterable[int]) -> None:
        """Says that blocks go to another sequence, which must never meet numbers that are not finite in them.

        They are emptied, layer by layer, when something is first written into them: at once it would take too long.
        """
        for stale in self._stale:
            stale.update(blocks)

    def places(self, block_T: Tensor, slot_T: Tensor) -> Tensor:
        """Where `write` puts rows: place_R of all their heads, row by row."""
        heads_K = torch.arange(self._keys[0].shape[1], device=block_T.device)
        head_TK = block_T[:, None] * len(heads_K) + heads_K
        return (head_TK * BLOCK_TOKENS + slot_T[:, None]).flatten()

    def write(self, layer: int, place_R: Tensor, k_TKd: Tensor, v_TKv: Tensor) -> None:
        """Puts the rows of a step in their places; the same rows may be put there again."""
        if self._stale[layer]:
            self.prepare(layer, (place_R // (self._keys[layer].shape[1] * BLOCK_TOKENS)).tolist())
        _put(self._keys[layer], place_R, k_TKd)
        if not self._is_latent:
            _put(self._values[layer], place_R, v_TKv)

    def prepare(self, layer: int, blocks: Iterable[int]) -> None:
        """Empties those blocks that are to be emptied before something is put into them."""
        if self._stale[layer]:
            self._empty(layer, self._stale[layer].intersection(blocks))

    def put(self, layer: int, block_T: Tensor, slot_T: Tensor, k_TKd: Tensor, v_TKv: Tensor) -> None:
        """Puts rows in their places, in blocks that are prepared; nothing else is needed for it on the host."""
        self._keys[layer][block_T, :, slot_T] = k_TKd.to(self._keys[layer].dtype)
        if not self._is_latent:
            self._values[layer][block_T, :, slot_T] = v_TKv.to(self._values[layer].dtype)

    def _empty(self, layer: int, blocks: set[int]) -> None:
        for pool in (self._keys[layer], *self._values[layer : layer + 1]):
            for block in blocks:
                pool[block].zero_()
        self._stale[layer] -= blocks

    def read(self, layer: int, blocks_NB: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [N, B, K, S, d] and values [N, B, K, S, v] of blocks, copied."""
        keys = _copied(self._keys[layer], blocks_NB)
        return keys, keys[..., : self._value_width] if self._is_latent else _copied(self._values[layer], blocks_NB)

    def view(self, layer: int, blocks: Sequence[Sequence[int]]) -> tuple[Picked, Picked]:
        """Keys and values of the blocks of some tiles, where they are."""
        keys = self._keys[layer]
        values = keys[..., : self._value_width] if self._is_latent else self._values[layer]
        return Picked(keys, blocks), Picked(values, blocks)


def _put(pool: Tensor, place_R: Tensor, x_TKw: Tensor) -> None:
    width = pool.shape[-1]
    pool.view(-1, width).index_copy_(0, place_R, x_TKw.detach().to(pool.dtype).reshape(-1, width))


def _copied(pool: Tensor, blocks_NB: Tensor) -> Tensor:
    """Blocks of a pool, copied whole; indexing would copy element by element."""
    return pool.index_select(0, blocks_NB.flatten()).view(*blocks_NB.shape, *pool.shape[1:])


def _shape(spec: ModelSpec) -> tuple[int, int, int]:
    """Key heads, and the widths of a key and a value."""
    attention = spec.attention
    if attention.kind == "latent":
        return 1, attention.latent_rank + 2 * len(spec.rotary.frequencies), attention.latent_rank
    return attention.kv_heads, attention.head_width, attention.head_width


@dataclass(frozen=True)
class Span:
    """Rows of one sequence: they stand at `position` and behind.

    Attributes:
        blocks: The sequence's blocks, enough for the last of these rows.
        position: Tokens before these rows.
        rows: How many rows, at least 1.
    """

    blocks: Sequence[int]
    position: int
    rows: int


@dataclass(frozen=True)
class _Tile:
    """Rows of one span that are attended together, and the blocks that they can see."""

    span: Span
    first_row: int
    position: int
    rows: int

    def needed(self, window: int) -> range:
        """Ordinals of the blocks that hold keys which some row sees."""
        first = max(0, self.position - window + 1) // BLOCK_TOKENS if window else 0
        return range(first, blocks_of(self.position + self.rows))


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
        self._tiles = list(_tiles(spans))
        self._rows = sum(span.rows for span in spans)
        self._batches: dict[tuple[int, int, int], list[_Batch]] = {}

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

    def _attended(self, q_THd: Tensor, batch: _Batch, key_heads: int, pattern: Pattern) -> Tensor:
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

    def _batched(self, window: int, key_heads: int, share: int) -> list[_Batch]:
        """The tiles, batched by their shape; made once, since most layers are alike."""
        key = (window, key_heads, share)
        if key not in self._batches:
            self._batches[key] = [
                _Batch(tiles, rows, window, share, self._rows, self._device)
                for rows, tiles in _batches(self._tiles, window, key_heads, share)
            ]
        return self._batches[key]


class _Batch:
    """N tiles of at most P rows; behind a tile's end its last row is repeated.

    Args:
        tiles: The tiles.
        rows: P on CUDA; elsewhere it is no more than what the longest tile has.
        window: How many of the latest tokens are seen; 0 for all.
        share: Query heads of each key head.
        step_rows: Of the whole step.
        device: Where the step is computed.
    """

    def __init__(
        self, tiles: list[_Tile], rows: int, window: int, share: int, step_rows: int, device: torch.device
    ) -> None:
        if device.type != "cuda":
            rows = max(tile.rows for tile in tiles)
        needed = [tile.needed(window) for tile in tiles]
        most = max(map(len, needed))
        counts_N1 = np.array([tile.rows for tile in tiles])[:, None]
        places_NP = np.minimum(np.arange(rows)[None, :], counts_N1 - 1)
        rows_NP = np.array([tile.first_row for tile in tiles])[:, None] + places_NP
        positions_NP = np.array([tile.position for tile in tiles])[:, None] + places_NP
        blocks_NB = np.empty((len(tiles), most), np.int64)
        ordinals_NB = np.full((len(tiles), most), 2**32, np.int64)  # behind every position: hidden
        for row, (tile, ordinals) in enumerate(zip(tiles, needed, strict=True)):
            blocks_NB[row] = tile.span.blocks[ordinals.start]  # hidden, but never another sequence's
            blocks_NB[row, : len(ordinals)] = tile.span.blocks[ordinals.start : ordinals.stop]
            ordinals_NB[row, : len(ordinals)] = ordinals
        keys_NBS = ordinals_NB[:, :, None] * BLOCK_TOKENS + np.arange(BLOCK_TOKENS)
        queries_NM = np.repeat(positions_NP, share, axis=1)[:, None, :, None]
        hidden_NBMS = keys_NBS[:, :, None, :] > queries_NM
        if window:
            hidden_NBMS |= keys_NBS[:, :, None, :] <= queries_NM - window
        inside_NP = np.arange(rows)[None, :] < counts_N1
        self.shape = rows_NP.shape
        self.is_whole_step = np.array_equal(rows_NP.ravel(), np.arange(step_rows))
        self.blocks = [
            tile.span.blocks[ordinals.start : ordinals.stop] for tile, ordinals in zip(tiles, needed, strict=True)
        ]
        self.rows = torch.from_numpy(rows_NP.ravel()).to(device)
        self.inside_rows = torch.from_numpy(rows_NP[inside_NP]).to(device)
        self.inside_places = torch.from_numpy(np.flatnonzero(inside_NP)).to(device)
        self.blocks_NB = torch.from_numpy(blocks_NB).to(device)
        self.hidden_NBMS = torch.from_numpy(hidden_NBMS).to(device)


def _blocks_of_rows(span: Span) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    ordinals = np.arange(span.position, span.position + span.rows) // BLOCK_TOKENS
    return np.asarray(span.blocks, np.int64)[ordinals]


def _tiles(spans: Sequence[Span]) -> list[_Tile]:
    tiles = []
    start = 0
    for span in spans:
        for first in range(0, span.rows, TILE_ROWS):
            rows = min(TILE_ROWS, span.rows - first)
            tiles.append(_Tile(span, start + first, span.position + first, rows))
        start += span.rows
    return tiles


def _batches(tiles: list[_Tile], window: int, key_heads: int, share: int) -> list[tuple[int, list[_Tile]]]:
    """Tiles of one padded number of rows together, similar numbers of blocks beside each other, bounded in size."""
    multiple = invariant.ROW_MULTIPLE // gcd(invariant.ROW_MULTIPLE, share)

    def shape(tile: _Tile) -> tuple[int, int]:
        return -(-tile.rows // multiple) * multiple, len(tile.needed(window))

    batches = []
    for rows, alike in groupby(sorted(tiles, key=shape), key=lambda tile: shape(tile)[0]):
        batch: list[_Tile] = []
        for tile in alike:
            scores = (len(batch) + 1) * shape(tile)[1] * BLOCK_TOKENS * key_heads * rows * share
            if batch and scores > MAX_SCORES:
                batches.append((rows, batch))
                batch = []
            batch.append(tile)
        batches.append((rows, batch))
    return batches
