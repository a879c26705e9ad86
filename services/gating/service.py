"""What gating offers."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc.aio
import numpy as np
import numpy.typing as npt

from expertmesh import wire
from expertmesh.dispatch import Gated
from expertmesh.errors import InvalidInput, WrongPart
from expertmesh.model.arrays import to_arrays, to_numpy
from expertmesh.model.gating import GatingStage
from expertmesh.model.layers import DTYPES
from expertmesh.model.sequences import Sequences
from expertmesh.serving.leases import Leases, Place
from expertmesh.serving.stage import Stage
from expertmesh.v1.gating_pb2 import (
    GateRequest,
    GateResponse,
    OpenRequest,
    OpenResponse,
    ReleaseRequest,
    ReleaseResponse,
    ShareRequest,
    ShareResponse,
)
from expertmesh.v1.gating_pb2_grpc import GatingServiceServicer


class GatingServicer(GatingServiceServicer):
    """Attention and router of every layer.

    Args:
        stage: Device and loader.
        leases: The KV cache, of a model that generates.
    """

    def __init__(self, stage: Stage, leases: Leases | None = None) -> None:
        self._stage = stage
        self._leases = leases
        self._layers = [stage.loader.gating(layer) for layer in range(stage.spec.layers)]
        stage.warm_up(self._warm_up)

    def Gate(self, request: GateRequest, context: grpc.aio.ServicerContext) -> asyncio.Future[GateResponse]:
        """Runs one layer's attention and routes its rows."""
        spec = self._stage.spec
        if not 0 <= request.layer < spec.layers:
            raise WrongPart(f"there is no layer {request.layer}; this model has {spec.layers}")
        x_TD = wire.decode_finite(request.rows, (None, spec.width), "rows")
        lengths_B = wire.decode_lengths(request.lengths, len(x_TD), spec.context)
        return self._stage.compute(len(x_TD), lambda: encode_gated(self._gate(request, x_TD, lengths_B)), context)

    def Share(self, request: ShareRequest, context: grpc.aio.ServicerContext) -> asyncio.Future[ShareResponse]:
        """Runs one layer's shared experts."""
        layer = self._layers[request.layer] if 0 <= request.layer < len(self._layers) else None
        if layer is None or not layer.has_shared:
            raise WrongPart(f"layer {request.layer} has no shared experts here")
        rows_TD = wire.decode_rows(request.rows, (None, self._stage.spec.width), "rows")
        return self._stage.compute(len(rows_TD), lambda: self._share(layer, rows_TD), context)

    async def Open(self, request: OpenRequest, context: grpc.aio.ServicerContext) -> OpenResponse:
        """Reserves room in the KV cache for a sequence."""
        self._cached().open(request.sequence, request.epoch, request.tokens)
        return OpenResponse()

    async def Release(self, request: ReleaseRequest, context: grpc.aio.ServicerContext) -> ReleaseResponse:
        """Frees sequences."""
        return ReleaseResponse(released=self._cached().release(request.sequences))

    def _gate(self, request: GateRequest, x_TD: npt.NDArray[np.float32], lengths_B: npt.NDArray[np.int32]) -> Gated:
        gated: Gated = self._layers[request.layer](
            self._stage.tensor(x_TD), self._sequences(request, lengths_B.tolist(), lengths_B), request.shared_apart
        )
        return gated

    def _share(self, layer: GatingStage, rows_TD: npt.NDArray[Any]) -> ShareResponse:
        shared_TD = layer.share(self._stage.tensor(rows_TD).to(DTYPES[self._stage.spec.dtype]))
        return ShareResponse(rows=wire.encode(to_numpy(shared_TD)))

    def _sequences(self, request: GateRequest, lengths: list[int], lengths_B: npt.NDArray[np.int32]) -> Sequences:
        if self._leases is None:
            if request.places:
                raise InvalidInput("this model has no cache; its sequences are whole", "places")
            return self._stage.sequences(lengths_B)
        if len(request.places) != len(lengths):
            raise InvalidInput("there must be one place for each sequence", "places")
        places = [
            Place(place.sequence, place.epoch, place.position, rows)
            for place, rows in zip(request.places, lengths, strict=True)
        ]
        return self._leases.rows(places, request.layer)

    def _cached(self) -> Leases:
        if self._leases is None:
            raise WrongPart("this model classifies; it has no KV cache")
        return self._leases

    def _warm_up(self) -> None:
        x_TD = np.zeros((8, self._stage.spec.width), np.float32)
        lengths_B = np.array([8], np.int32)
        request = GateRequest()
        if self._leases is not None:
            place = request.places.add(sequence=bytes(16))
            self._leases.open(place.sequence, 0, 8)
        self._gate(request, x_TD, lengths_B)
        if self._leases is not None:
            self._leases.release([bytes(16)])


def encode_gated(gated: Gated) -> GateResponse:
    """Writes what gating gives."""
    if gated.expert_ids_TK is None:
        return GateResponse(residual=wire.encode(to_numpy(gated.residual_TD)))
    residual_TD, expert_input_TD, ids_TK, weights_TK = to_arrays(
        gated.residual_TD, gated.expert_input_TD, gated.expert_ids_TK, gated.weights_TK
    )
    response = GateResponse()
    wire.fill(response.residual, residual_TD)
    wire.fill(response.expert_input, expert_input_TD)
    wire.fill(response.expert_ids, ids_TK.astype(np.int32))
    wire.fill(response.weights, weights_TK)
    return response
