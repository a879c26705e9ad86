"""The rows of a step in tiles, each of which is attended at once, and tiles in batches of one shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import gcd

import numpy as np
import torch

from expertmesh.model import invariant
from expertmesh.model.cache import BLOCK_TOKENS, blocks_of

TILE_ROWS = 64  # rows of one sequence that are attended together
MAX_SCORES = 2**23  # elements of a score tensor, by which long work is cut


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
class Tile:
    """Rows of one span that are attended together, and the blocks that they can see."""

    span: Span
    first_row: int
    position: int
    rows: int

    def needed(self, window: int) -> range:
        """Ordinals of the blocks that hold keys which some row sees."""
        first = max(0, self.position - window + 1) // BLOCK_TOKENS if window else 0
        return range(first, blocks_of(self.position + self.rows))


class Batch:
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
        self, tiles: list[Tile], rows: int, window: int, share: int, step_rows: int, device: torch.device
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


def cut(spans: Sequence[Span]) -> list[Tile]:
    """The rows of a step, sequence after sequence, in tiles of at most `TILE_ROWS`."""
    tiles = []
    start = 0
    for span in spans:
        for first in range(0, span.rows, TILE_ROWS):
            rows = min(TILE_ROWS, span.rows - first)
            tiles.append(Tile(span, start + first, span.position + first, rows))
        start += span.rows
    return tiles


def batched(tiles: list[Tile], window: int, key_heads: int, share: int) -> list[tuple[int, list[Tile]]]:
    """Tiles of one padded number of rows together, similar numbers of blocks beside each other, bounded in size."""
    multiple = invariant.ROW_MULTIPLE // gcd(invariant.ROW_MULTIPLE, share)

    def shape(tile: Tile) -> tuple[int, int]:
        return -(-tile.rows // multiple) * multiple, len(tile.needed(window))

    batches = []
    for rows, alike in groupby(sorted(tiles, key=shape), key=lambda tile: shape(tile)[0]):
        batch: list[Tile] = []
        for tile in alike:
            scores = (len(batch) + 1) * shape(tile)[1] * BLOCK_TOKENS * key_heads * rows * share
            if batch and scores > MAX_SCORES:
                batches.append((rows, batch))
                batch = []
            batch.append(tile)
        batches.append((rows, batch))
    return batches
