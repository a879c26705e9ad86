"""The experts that a service holds, and the rows of one or several calls through them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expertmesh import wire
from expertmesh.model.arrays import to_numpy
from expertmesh.model.experts import ExpertGroup
from expertmesh.model.layers import DTYPES, GatedMLP
from expertmesh.serving.stage import Stage

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Rows:
    """The rows of one call.

    Attributes:
        experts: Whose they are, ascending.
        counts: Rows of each expert.
        rows_ND: In that order, in one of `wire.ROW_DTYPES`.
    """

    experts: Sequence[int]
    counts: Sequence[int]
    rows_ND: Array


class Bank:
    """Experts by layer.

    Args:
        stage: Device and loader.
        pairs: (layer, expert) of each.
    """

    def __init__(self, stage: Stage, pairs: Sequence[tuple[int, int]]) -> None:
        self._stage = stage
        self._dtype = DTYPES[stage.spec.dtype]
        self.pair2expert: dict[tuple[int, int], GatedMLP] = {pair: stage.loader.expert(*pair) for pair in pairs}
        self._groups = {
            layer: ExpertGroup({e: self.pair2expert[one, e] for one, e in pairs if one == layer}, stage.loader.graphs)
            for layer in {layer for layer, _ in pairs}
        }

    def apply(self, layer: int, calls: Sequence[Rows]) -> list[Array]:
        """Applies experts of one layer to the rows of calls that share a dtype; gives rows for each call in that dtype.

        An expert sees the rows of all calls as one product, in which no row's bits depend on the others.
        """
        if len(calls) == 1:
            return [wire.narrow(self._apply(layer, calls[0]), calls[0].rows_ND.dtype)]
        order = sorted((expert, index) for index, call in enumerate(calls) for expert in call.experts)
        pieces = [
            dict(zip(call.experts, np.split(call.rows_ND, np.cumsum(call.counts)[:-1]), strict=True)) for call in calls
        ]
        experts = sorted({expert for expert, _ in order})
        counts = [sum(len(piece[expert]) for piece in pieces if expert in piece) for expert in experts]
        rows_ND = np.concatenate([pieces[index][expert] for expert, index in order])
        out_ND = self._apply(layer, Rows(experts, counts, rows_ND))
        ends = np.cumsum([len(pieces[index][expert]) for expert, index in order])
        given = dict(zip(order, np.split(out_ND, ends[:-1]), strict=True))
        return [  # one by one: rows that do not fit the dtype of their call may not widen those of another
            wire.narrow(np.concatenate([given[expert, index] for expert in call.experts]), call.rows_ND.dtype)
            for index, call in enumerate(calls)
        ]

    def _apply(self, layer: int, call: Rows) -> Array:
        x_ND = self._stage.tensor(call.rows_ND).to(self._dtype)
        return to_numpy(self._groups[layer](call.experts, call.counts, x_ND))
