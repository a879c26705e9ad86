"""What an expert service offers."""

from __future__ import annotations

from typing import Any

import grpc.aio
import numpy as np
import numpy.typing as npt

from expertmesh import wire
from expertmesh.checkpoint.manifest import expert_part
from expertmesh.errors import InvalidInput, WrongPart
from expertmesh.model.arrays import to_numpy
from expertmesh.model.experts import ExpertGroup
from expertmesh.model.layers import DTYPES, GatedMLP
from expertmesh.serving.stage import Stage
from expertmesh.telemetry import metrics
from expertmesh.v1.expert_pb2 import ApplyRequest, ApplyResponse
from expertmesh.v1.expert_pb2_grpc import ExpertServiceServicer
from expertmesh.v1.fault_pb2 import ChangeWeightRequest, ChangeWeightResponse
from expertmesh.v1.fault_pb2_grpc import FaultServiceServicer


class ExpertServicer(ExpertServiceServicer):
    """Pure functions of rows, one for each (layer, expert) that this service holds.

    Args:
        stage: Device and loader.
        pairs: What it holds.
    """

    def __init__(self, stage: Stage, pairs: list[tuple[int, int]]) -> None:
        self._stage = stage
        self.pair2expert: dict[tuple[int, int], GatedMLP] = {pair: stage.loader.expert(*pair) for pair in pairs}
        self._groups = {
            layer: ExpertGroup({e: self.pair2expert[one, e] for one, e in pairs if one == layer}, stage.loader.graphs)
            for layer in {layer for layer, _ in pairs}
        }
        layer, expert = pairs[0]
        rows_ND = np.zeros((8, stage.spec.width), np.float32)
        stage.warm_up(lambda: self._apply(layer, [expert], [8], rows_ND))

    async def Apply(self, request: ApplyRequest, context: grpc.aio.ServicerContext) -> ApplyResponse:
        """Applies experts of one layer, each to its rows."""
        counts = list(request.counts)
        experts = self._experts_of(request)
        rows_ND = wire.decode_rows(request.rows, (sum(counts), self._stage.spec.width), "rows")
        out_ND = await self._stage.compute(len(rows_ND), lambda: self._apply(request.layer, experts, counts, rows_ND))
        for expert, count in zip(request.experts, counts, strict=True):
            metrics.EXPERT_TOKENS.labels(request.layer, expert).inc(count)
        return ApplyResponse(
            layer=request.layer,
            experts=request.experts,
            digests=[self._digest(request.layer, expert) for expert in request.experts],
            rows=wire.encode(out_ND),
        )

    def _experts_of(self, request: ApplyRequest) -> list[int]:
        ids = list(request.experts)
        if not ids or ids != sorted(set(ids)):
            raise InvalidInput("experts must ascend, each at most once, at least one", "experts")
        if len(request.counts) != len(ids) or min(request.counts) < 1:
            raise InvalidInput("counts needs one number for each expert, each at least 1", "counts")
        for expert in ids:
            if (request.layer, expert) not in self.pair2expert:
                raise WrongPart(f"this service does not hold expert {expert} of layer {request.layer}")
        return ids

    def _apply(self, layer: int, experts: list[int], counts: list[int], rows_ND: npt.NDArray[Any]) -> npt.NDArray[Any]:
        x_ND = self._stage.tensor(rows_ND).to(DTYPES[self._stage.spec.dtype])
        return wire.narrow(to_numpy(self._groups[layer](experts, counts, x_ND)), rows_ND.dtype)

    def _digest(self, layer: int, expert: int) -> bytes:
        return self._stage.loader.manifest.parts[expert_part(layer, expert)].digest


class FaultServicer(FaultServiceServicer):
    """Faults on demand, offered only with `--faults`."""

    def __init__(self, experts: ExpertServicer) -> None:
        self._experts = experts

    async def ChangeWeight(
        self, request: ChangeWeightRequest, context: grpc.aio.ServicerContext
    ) -> ChangeWeightResponse:
        """Changes one weight in memory."""
        expert = self._experts.pair2expert.get((request.layer, request.expert))
        if expert is None:
            raise WrongPart(f"this service does not hold expert {request.expert} of layer {request.layer}")
        weight = expert.down.weight.data.view(-1)
        weight[weight.abs().argmax()] += request.delta
        return ChangeWeightResponse()
