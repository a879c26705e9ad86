"""What the head of a model that classifies offers."""

from __future__ import annotations

import asyncio

import grpc.aio
import numpy as np
import numpy.typing as npt

from expertmesh import wire
from expertmesh.errors import WrongPart
from expertmesh.model.arrays import to_numpy
from expertmesh.serving.stage import Stage
from expertmesh.v1.classifier_pb2 import SampleRequest, SampleResponse, ScoreRequest, ScoreResponse
from expertmesh.v1.classifier_pb2_grpc import ClassifierServiceServicer


class ClassifierServicer(ClassifierServiceServicer):
    """Classes of sequences."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._classifier = stage.loader.classifier()
        x_TD = np.zeros((8, stage.spec.width), np.float32)
        stage.warm_up(lambda: self._classifier(stage.tensor(x_TD), stage.sequences(np.array([8]))))

    def Score(self, request: ScoreRequest, context: grpc.aio.ServicerContext) -> asyncio.Future[ScoreResponse]:
        """Gives logits and probabilities of a batch of sequences."""
        spec = self._stage.spec
        x_TD = wire.decode_finite(request.rows, (None, spec.width), "rows")
        lengths_B = wire.decode_lengths(request.lengths, len(x_TD), spec.context)
        return self._stage.compute(len(x_TD), lambda: self._score(x_TD, lengths_B), context)

    async def Sample(self, request: SampleRequest, context: grpc.aio.ServicerContext) -> SampleResponse:
        """Refuses: this model classifies."""
        raise WrongPart("this model classifies; it has no next token")

    def _score(self, x_TD: npt.NDArray[np.float32], lengths_B: npt.NDArray[np.int32]) -> ScoreResponse:
        scores = self._classifier(self._stage.tensor(x_TD), self._stage.sequences(lengths_B))
        return ScoreResponse(
            logits=wire.encode(to_numpy(scores.logits_BC)),
            probabilities=wire.encode(to_numpy(scores.probabilities_BC)),
        )
