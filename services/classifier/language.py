"""What the head of a language model offers."""

from __future__ import annotations

import asyncio

import grpc.aio
import numpy as np
from torch import Tensor

from expertmesh import wire
from expertmesh.errors import InvalidInput, WrongPart
from expertmesh.model.arrays import to_numpy
from expertmesh.model.sampling import Draw, Token, sample
from expertmesh.serving.sampling import decode_draws, encode_tokens
from expertmesh.serving.stage import Stage
from expertmesh.v1.classifier_pb2 import SampleRequest, SampleResponse, ScoreRequest, ScoreResponse
from expertmesh.v1.classifier_pb2_grpc import ClassifierServiceServicer

ROWS_AT_ONCE = 64  # bounds the memory that logits take: 39 MB at a vocabulary of 151,936
_SPARE_BYTES = 2**10  # of a message, for what is not logits


class LanguageHeadServicer(ClassifierServiceServicer):
    """Logits, and the choice of a token from them.

    Args:
        stage: Device and loader.
        inspect: Whether logits may leave the service.
        max_reply_bytes: Largest reply that a peer accepts.
    """

    def __init__(self, stage: Stage, inspect: bool = False, max_reply_bytes: int = 64 * 2**20) -> None:
        self._stage = stage
        self._head = stage.loader.classifier()
        self._inspect = inspect
        self._max_reply_bytes = max_reply_bytes
        x_BD = np.zeros((2, stage.spec.width), np.float32)
        stage.warm_up(lambda: self._head(stage.tensor(x_BD)))

    def Sample(self, request: SampleRequest, context: grpc.aio.ServicerContext) -> asyncio.Future[SampleResponse]:
        """Gives the next token of each row."""
        spec = self._stage.spec
        x_BD = wire.decode_finite(request.rows, (None, spec.width), "rows")
        draws = decode_draws(request.draws, len(x_BD), spec.embedding.vocab)
        return self._stage.compute(len(x_BD), lambda: self._sample(self._stage.tensor(x_BD), draws), context)

    def Score(self, request: ScoreRequest, context: grpc.aio.ServicerContext) -> asyncio.Future[ScoreResponse]:
        """Gives the next-token logits of every row."""
        if not self._inspect:
            raise WrongPart("logits stay in the head unless its settings switch inspection on")
        spec = self._stage.spec
        x_TD = wire.decode_finite(request.rows, (None, spec.width), "rows")
        wire.decode_lengths(request.lengths, len(x_TD), spec.context)
        most = (self._max_reply_bytes - _SPARE_BYTES) // (4 * spec.embedding.vocab)
        if len(x_TD) > most:
            raise InvalidInput(f"the logits of {len(x_TD)} rows do not fit a reply; ask for at most {most}", "rows")
        return self._stage.compute(len(x_TD), lambda: self._score(self._stage.tensor(x_TD)), context)

    def _score(self, x_TD: Tensor) -> ScoreResponse:
        return ScoreResponse(logits=wire.encode(to_numpy(self._head(x_TD))))

    def _sample(self, x_BD: Tensor, draws: list[Draw]) -> SampleResponse:
        tokens: list[Token] = []
        for start in range(0, len(draws), ROWS_AT_ONCE):
            rows = slice(start, start + ROWS_AT_ONCE)
            tokens += sample(self._head(x_BD[rows]), draws[rows])
        return encode_tokens(tokens)
