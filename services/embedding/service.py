"""What the embedding offers."""

from __future__ import annotations

import asyncio

import grpc.aio
import numpy as np
import numpy.typing as npt

from expertmesh import wire
from expertmesh.model.arrays import to_numpy
from expertmesh.serving.stage import Stage
from expertmesh.v1.embedding_pb2 import EmbedRequest, EmbedResponse
from expertmesh.v1.embedding_pb2_grpc import EmbeddingServiceServicer


class EmbeddingServicer(EmbeddingServiceServicer):
    """Token ids to rows."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._embedding = stage.loader.embedding()
        ids_T = np.zeros(8, np.int64)
        stage.warm_up(lambda: self._embedding(stage.tensor(ids_T), stage.sequences(np.array([8]))))

    def Embed(self, request: EmbedRequest, context: grpc.aio.ServicerContext) -> asyncio.Future[EmbedResponse]:
        """Embeds the tokens of a batch of sequences."""
        spec = self._stage.spec
        ids_T = wire.decode_ids(request.ids, spec.embedding.vocab)
        lengths_B = wire.decode_lengths(request.lengths, len(ids_T), spec.context)
        return self._stage.compute(len(ids_T), lambda: self._embed(ids_T, lengths_B), context)

    def _embed(self, ids_T: npt.NDArray[np.int32], lengths_B: npt.NDArray[np.int32]) -> EmbedResponse:
        rows_TD = self._embedding(self._stage.tensor(ids_T).long(), self._stage.sequences(lengths_B))
        return EmbedResponse(rows=wire.encode(to_numpy(rows_TD)))
