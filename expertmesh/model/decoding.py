"""A step of one token of each sequence, told in tensors of fixed shapes and never waiting, so that it can be recorded.

It gives the bits of any other step: a row depends neither on the rows that pad the step nor on hidden key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertmesh.model import invariant
from expertmesh.model.graphs import padded
from expertmesh.model.rotary import Rotary
from expertmesh.model.sequences import Pattern, Sequences

MOST_KEY_BLOCKS = 512  # of all rows of a recorded step together, hidden ones included


class Cache(Protocol):
    """What a step needs of a `cache.KeyValueCache`."""

    block_tokens: int

    def put(self, layer: int, block_T: Tensor, slot_T: Tensor, k_TKd: Tensor, v_TKv: Tensor) -> None:
        """Puts rows in their places."""

    def read(self, layer: int, blocks_NB: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [N, B, K, S, d] and values [N, B, K, S, v] of blocks."""


def fits(rows: int, blocks: int) -> bool:
    """Whether a step of so many rows is recorded, the longest sequence of which has so many blocks."""
    return 0 < padded(rows) * _power_of_two(blocks) <= MOST_KEY_BLOCKS


def token_table(places: Sequence[tuple[int, Sequence[int]]], block_tokens: int, spare: int) -> npt.NDArray[np.int64]:
    """The table of a step.

    Args:
        places: Position and blocks of each sequence.
        block_tokens: Tokens of a block.
        spare: The block of rows that pad the step.

    Returns:
        [T, 1 + B]: position and blocks of each row; T and B are the next numbers that are recorded. Blocks behind a
        sequence's last are its first again, where they are hidden.
    """
    needed = [position // block_tokens + 1 for position, _ in places]
    table = np.full((padded(len(places)), 1 + _power_of_two(max(needed))), spare, np.int64)
    table[:, 0] = 0
    for row, ((position, blocks), count) in enumerate(zip(places, needed, strict=True)):
        table[row, 0] = position
        table[row, 1:] = blocks[0]
        table[row, 1 : 1 + count] = blocks[:count]
    return table


class TokenStep(Sequences):
    """The layout of such a step.

    Args:
        table_TI: See `token_table`.
        cache: Where keys and values are; its blocks are prepared.
        rotary: Of the model.
    """

    def __init__(self, table_TI: Tensor, cache: Cache, rotary: Rotary) -> None:
        super().__init__(torch.ones_like(table_TI[:, 0]), rotary)
        self.positions_T = table_TI[:, 0]
        self._blocks_TB = table_TI[:, 1:]
        self._cache = cache

    def attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKv: Tensor, pattern: Pattern) -> Tensor:
        """Caches the rows' keys and values, and attends to everything before them and themselves; float32."""
        size, blocks = self._cache.block_tokens, self._blocks_TB.shape[1]
        block_T = torch.gather(self._blocks_TB, 1, self.positions_T[:, None] // size)[:, 0]
        self._cache.put(pattern.layer, block_T, self.positions_T % size, k_TKd, v_TKv)
        keys, values = self._cache.read(pattern.layer, self._blocks_TB)
        key_heads = k_TKd.shape[1]
        share = q_THd.shape[1] // key_heads
        places_BS = torch.arange(blocks * size, device=keys.device).view(blocks, size)
        position_T11 = self.positions_T[:, None, None]
        hidden_TBS = places_BS > position_T11
        if pattern.window:
            hidden_TBS = hidden_TBS | (places_BS <= position_T11 - pattern.window)
        q_TKMd = q_THd.to(keys.dtype).view(len(q_THd), key_heads, share, -1)
        sinks = pattern.sinks_H
        sinks_KM = None if sinks is None else sinks.view(key_heads, share)
        mixed = invariant.causal_attention(q_TKMd, keys, values, hidden_TBS[:, :, None], pattern.scale, sinks_KM)
        return mixed.flatten(1, 2)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
