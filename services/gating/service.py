"""What gating offers."""

from __future__ import annotations

import grpc.aio
import numpy as np

from expertmesh import wire
from expertmesh.errors import WrongPart
from expertmesh.model.arrays import to_numpy
from expertmesh.serving.stage import Stage
from expertmesh.v1.gating_pb2 import GateRequest, GateResponse
from expertmesh.v1.gating_pb2_grpc import GatingServiceServicer


class GatingServicer(GatingServiceServicer):
    """Attention and router of every layer."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._layers = [stage.loader.gating(layer) for layer in range(stage.spec.layers)]
        x_TD = np.zeros((8, stage.spec.width), np.float32)
        stage.warm_up(lambda: self._layers[0](stage.tensor(x_TD), stage.sequences(np.array([8]))))

    async def Gate(self, request: GateRequest, context: grpc.aio.ServicerContext) -> GateResponse:
        """Runs one layer's attention and routes its rows."""
        spec = self._stage.spec
        if not 0 <= request.layer < spec.layers:
            raise WrongPart(f"there is no layer {request.layer}; this model has {spec.layers}")
        x_TD = wire.decode_finite(request.rows, (None, spec.width), "rows")
        lengths_B = wire.decode_lengths(request.lengths, len(x_TD), spec.context)
        gated = await self._stage.compute(
            len(x_TD),
            lambda: self._layers[request.layer](self._stage.tensor(x_TD), self._stage.sequences(lengths_B)),
        )
        return GateResponse(
            residual=wire.encode(to_numpy(gated.residual_TD)),
            expert_input=wire.encode(to_numpy(gated.expert_input_TD)),
            expert_ids=wire.encode(to_numpy(gated.expert_ids_TK).astype(np.int32)),
            weights=wire.encode(to_numpy(gated.weights_TK)),
        )
