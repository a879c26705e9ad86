"""What an expert service offers."""

from __future__ import annotations

import grpc.aio
import numpy as np

from expertmesh import wire
from expertmesh.checkpoint.manifest import expert_part
from expertmesh.errors import InvalidInput, WrongPart
from expertmesh.serving.stage import Stage
from expertmesh.telemetry import metrics
from expertmesh.v1.expert_pb2 import ApplyRequest, ApplyResponse
from expertmesh.v1.expert_pb2_grpc import ExpertServiceServicer

from .bank import Bank, Rows


class ExpertServicer(ExpertServiceServicer):
    """Pure functions of rows, one for each (layer, expert) that this service holds.

    Args:
        stage: Device and loader.
        pairs: What it holds.
    """

    def __init__(self, stage: Stage, pairs: list[tuple[int, int]]) -> None:
        self._stage = stage
        self.bank = Bank(stage, pairs)
        layer, expert = pairs[0]
        warm_up = Rows([expert], [8], np.zeros((8, stage.spec.width), np.float32))
        stage.warm_up(lambda: self.bank.apply(layer, [warm_up]))
        self._digests = {pair: stage.loader.manifest.parts[expert_part(*pair)].digest for pair in pairs}
        self._tokens = {pair: metrics.EXPERT_TOKENS.labels(*pair) for pair in pairs}

    async def Apply(self, request: ApplyRequest, context: grpc.aio.ServicerContext) -> ApplyResponse:
        """Applies experts of one layer, each to its rows; calls that wait for one layer become one product."""
        rows = self._checked(request)
        layer, key = request.layer, (request.layer, rows.rows_ND.dtype)
        out_ND = await self._stage.turns.run_together(
            key, len(rows.rows_ND), rows, lambda calls: self.bank.apply(layer, calls)
        )
        for expert, count in zip(rows.experts, rows.counts, strict=True):
            self._tokens[layer, expert].inc(count)
        digests = [self._digests[layer, expert] for expert in rows.experts]
        return ApplyResponse(layer=layer, experts=rows.experts, digests=digests, rows=wire.encode(out_ND))

    def _checked(self, request: ApplyRequest) -> Rows:
        ids, counts = list(request.experts), list(request.counts)
        if not ids or ids != sorted(set(ids)):
            raise InvalidInput("experts must ascend, each at most once, at least one", "experts")
        if len(counts) != len(ids) or min(counts) < 1:
            raise InvalidInput("counts needs one number for each expert, each at least 1", "counts")
        for expert in ids:
            if (request.layer, expert) not in self.bank.pair2expert:
                raise WrongPart(f"this service does not hold expert {expert} of layer {request.layer}")
        return Rows(ids, counts, wire.decode_rows(request.rows, (sum(counts), self._stage.spec.width), "rows"))
