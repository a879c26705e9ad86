"""Experts of one layer that a process holds, each applied to rows of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from expertmesh.model import cuda
from expertmesh.model.arrays import to_torch
from expertmesh.model.cuda import Matrices, rows_of_tiles, tiles_of
from expertmesh.model.graphs import Graphs, padded
from expertmesh.model.invariant import packed_rows
from expertmesh.model.layers import GatedMLP

JOINED_ELEMENTS = 2**16  # most elements between the products for which a copy costs less than calls for each expert


class ExpertGroup:
    """Applies experts, one after another; on CUDA the same products of all of them are one launch.

    Either way a row has the bits that its expert alone gives it.

    Args:
        experts: The experts by id, all of one shape.
        graphs: Recordings on their device, if there are to be some.
    """

    def __init__(self, experts: Mapping[int, GatedMLP], graphs: Graphs | None = None) -> None:
        self._experts = experts
        self._graphs = graphs
        self._places = {expert: place for place, expert in enumerate(experts)}
        self._grouped: _Grouped | None = None

    def __call__(self, ids: Sequence[int], counts: Sequence[int], rows_ND: Tensor) -> Tensor:
        """Rows in, rows out, in one order and dtype.

        Args:
            ids: Experts that have rows.
            counts: How many each, at least 1.
            rows_ND: The rows, expert by expert.
        """
        if not cuda.serves(rows_ND):
            first = self._experts[ids[0]]
            if len(ids) == 1:
                return first(rows_ND)  # type: ignore[no-any-return]
            if first.gate_and_up.is_packed and len(rows_ND) * first.gate.out_features <= JOINED_ELEMENTS:
                return self._joined(ids, counts, rows_ND)
            pieces = rows_ND.split_with_sizes(list(counts))
            return torch.cat([self._experts[expert](piece) for expert, piece in zip(ids, pieces, strict=True)])
        grouped = self._at_their_place()
        places = [self._places[expert] for expert in ids]
        rows = padded(len(rows_ND)) if self._graphs is not None else 0
        if not rows or self._graphs is None:
            tile_rows = rows_of_tiles(len(rows_ND), len(ids))
            tiles_T3 = to_torch(tiles_of(places, counts, tile_rows), rows_ND.device)
            return grouped.apply(rows_ND, tiles_T3, tile_rows)[0]
        # as many tiles as there can be for so many rows, so that one recording serves however they are spread
        tile_rows = rows_of_tiles(rows, len(self._experts))
        most = rows // tile_rows + min(rows, len(self._experts))
        tiles_T3 = to_torch(tiles_of(places, counts, tile_rows, most), rows_ND.device)
        return self._graphs.run(grouped.apply, rows_ND, tiles_T3, fixed=(tile_rows,))[0]

    def _joined(self, ids: Sequence[int], counts: Sequence[int], rows_ND: Tensor) -> Tensor:
        """Applies packed experts to few rows: what lies between their products is computed for all together.

        Each expert's rows are followed by copies of its last one, as many as its product would be padded with.
        """
        padded_counts = [packed_rows(count) for count in counts]
        firsts = np.cumsum([0, *counts[:-1]])
        places = [
            first + np.minimum(np.arange(rows), count - 1)
            for first, rows, count in zip(firsts, padded_counts, counts, strict=True)
        ]
        experts = [self._experts[expert] for expert in ids]
        padded_PD = rows_ND.index_select(0, torch.from_numpy(np.concatenate(places)))
        pieces = padded_PD.split_with_sizes(padded_counts)
        both = [expert.gate_and_up.product(piece) for expert, piece in zip(experts, pieces, strict=True)]
        inner_PF = experts[0].inner(*experts[0].gate_and_up.split(torch.cat(both)))
        pieces = inner_PF.split_with_sizes(padded_counts)
        given = [expert.down(piece)[:count] for expert, piece, count in zip(experts, pieces, counts, strict=True)]
        return torch.cat(given)

    def _at_their_place(self) -> _Grouped:
        """The matrices where they are now: a model may have been moved or loaded anew."""
        first = next(iter(self._experts.values()))
        if self._grouped is None or self._grouped.gate.weights[0].data_ptr() != first.gate.weight.data_ptr():
            experts = list(self._experts.values())
            self._grouped = _Grouped(
                first,
                Matrices.of([expert.gate for expert in experts]),
                Matrices.of([expert.up for expert in experts]),
                Matrices.of([expert.down for expert in experts]),
            )
        return self._grouped


@dataclass(frozen=True, eq=False)
class _Grouped:
    """The matrices of several experts, and one of these for what lies between the products."""

    expert: GatedMLP
    gate: Matrices
    up: Matrices
    down: Matrices

    def apply(self, rows_ND: Tensor, tiles_T3: Tensor, tile_rows: int) -> tuple[Tensor]:
        """Applies to the rows of each tile its expert."""
        gate_NF = self.gate.multiply(rows_ND, tiles_T3, tile_rows)
        inner_NF = self.expert.inner(gate_NF, self.up.multiply(rows_ND, tiles_T3, tile_rows))
        return (self.down.multiply(inner_NF.to(rows_ND.dtype), tiles_T3, tile_rows),)
