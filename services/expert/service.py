"""What an expert service offers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import grpc.aio
import numpy as np

from expertmesh import wire
from expertmesh.checkpoint.manifest import expert_part
from expertmesh.errors import InvalidInput, WrongPart
from expertmesh.serving.stage import Stage
from expertmesh.telemetry import metrics
from expertmesh.v1.expert_pb2 import ApplyRequest, ApplyResponse
from expertmesh.v1.expert_pb2_grpc import ExpertServiceServicer

from .bank import Array, Bank, Rows


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
        self._tokens = {pair: metrics.EXPERT_TOKENS.labels(*pair).inc for pair in pairs}

    def Apply(self, request: ApplyRequest, context: grpc.aio.ServicerContext) -> asyncio.Future[ApplyResponse]:
        """Applies experts of one layer, each to its rows; calls that wait for one layer become one product."""
        rows, layer = self._checked(request), request.layer

        def apply(calls: Sequence[Rows]) -> list[ApplyResponse]:
            outs = self.bank.apply(layer, calls)
            return [self._response(layer, call, out_ND) for call, out_ND in zip(calls, outs, strict=True)]

        return self._stage.compute_together((layer, rows.rows_ND.dtype), len(rows.rows_ND), rows, apply, context)

    def _response(self, layer: int, call: Rows, out_ND: Array) -> ApplyResponse:
        for expert, count in zip(call.experts, call.counts, strict=True):
            metrics.LEDGER.enter(self._tokens[layer, expert], count)
        digests = [self._digests[layer, expert] for expert in call.experts]
        response = ApplyResponse(layer=layer, experts=call.experts, digests=digests)
        wire.fill(response.rows, out_ND)
        return response

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
