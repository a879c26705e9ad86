"""What the tokenizer offers."""

from __future__ import annotations

import asyncio

import grpc.aio

from expertmesh import wire
from expertmesh.errors import InvalidInput
from expertmesh.serving.requests import check_texts
from expertmesh.telemetry import metrics
from expertmesh.tokenization.tokenizer import Tokenizer
from expertmesh.v1.tokenizer_pb2 import DecodeRequest, DecodeResponse, EncodeRequest, EncodeResponse
from expertmesh.v1.tokenizer_pb2_grpc import TokenizerServiceServicer

MAX_DECODED_TOKENS = 2**16


class TokenizerServicer(TokenizerServiceServicer):
    """Text to token ids and back.

    Args:
        tokenizer: The model's own.
        context: Most tokens of a text.
    """

    def __init__(self, tokenizer: Tokenizer, context: int) -> None:
        self._tokenizer = tokenizer
        self._context = context

    async def Encode(self, request: EncodeRequest, context: grpc.aio.ServicerContext) -> EncodeResponse:
        """Gives the ids of a batch of texts, cut to the context."""
        check_texts(request.texts)
        if not 0 <= request.max_tokens <= self._context:
            raise InvalidInput(f"max_tokens must be in [0, {self._context}]", "max_tokens")
        with metrics.COMPUTE_SECONDS.labels("tokenizer").time():
            encoded = await asyncio.to_thread(
                self._tokenizer.encode, request.texts, request.max_tokens or self._context
            )
        metrics.TOKENS.labels("tokenizer").inc(len(encoded.ids_T))
        return EncodeResponse(
            ids=wire.encode(encoded.ids_T),
            lengths=wire.encode(encoded.lengths_B),
            truncated=encoded.truncated_B.tolist(),
        )

    async def Decode(self, request: DecodeRequest, context: grpc.aio.ServicerContext) -> DecodeResponse:
        """Gives the text of token ids."""
        ids_T = wire.decode(request.ids, wire.INT32, (None,), "ids")
        if len(ids_T) > MAX_DECODED_TOKENS:
            raise InvalidInput(f"{len(ids_T)} ids; at most {MAX_DECODED_TOKENS} in one call", "ids")
        if ids_T.min() < 0 or ids_T.max() >= self._tokenizer.vocab:
            raise InvalidInput(f"every id must be in [0, {self._tokenizer.vocab})", "ids")
        return DecodeResponse(text=self._tokenizer.decode(ids_T.tolist()))
