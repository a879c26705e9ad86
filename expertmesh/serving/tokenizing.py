"""What a tokenizer offers over the wire, wherever it runs: text to token ids and back, for both kinds of models."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from time import perf_counter
from types import TracebackType
from typing import TypeVar

import grpc.aio
import numpy as np

from expertmesh import wire
from expertmesh.errors import InvalidInput, WrongPart
from expertmesh.model.spec import ModelSpec
from expertmesh.rpc.server import Servicer
from expertmesh.serving.requests import check_texts
from expertmesh.telemetry import metrics
from expertmesh.tokenization.chat import ChatTemplate
from expertmesh.tokenization.language import LanguageTokenizer
from expertmesh.tokenization.tokenizer import Tokenizer
from expertmesh.v1.tokenizer_pb2 import (
    Chat,
    DecodeBatchRequest,
    DecodeBatchResponse,
    DecodeRequest,
    DecodeResponse,
    EncodePromptRequest,
    EncodePromptResponse,
    EncodeRequest,
    EncodeResponse,
)
from expertmesh.v1.tokenizer_pb2_grpc import TokenizerServiceServicer, add_TokenizerServiceServicer_to_server

MAX_DECODED_TOKENS = 2**16
MAX_SEQUENCES = 1024
MAX_PROMPT_BYTES = 2**20
PROMPT_BYTES_PER_TOKEN = 32
SPARE_PROMPT_BYTES = 1024
LONG_CHARACTERS = 16_384  # take longer than a few milliseconds, in which nobody else would be answered

ResultT = TypeVar("ResultT")


class TokenizerServicer(TokenizerServiceServicer):
    """Text to token ids and back. Leave its `async with` to end the process that renders chat templates.

    Args:
        tokenizer: The model's own.
        spec: The model, for its context and the rows of its embedding.
    """

    def __init__(self, tokenizer: Tokenizer | LanguageTokenizer, spec: ModelSpec) -> None:
        self._tokenizer = tokenizer
        self._context = spec.context
        self._work = metrics.Work("tokenizer")
        is_language = isinstance(tokenizer, LanguageTokenizer)
        self._vocab = spec.embedding.vocab if is_language else tokenizer.vocab
        self._template: ChatTemplate | None = None
        if isinstance(tokenizer, LanguageTokenizer) and tokenizer.chat_template is not None:
            self._template = ChatTemplate(tokenizer.chat_template, tokenizer.special_texts)

    async def __aenter__(self) -> TokenizerServicer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._template is not None:
            await self._template.close()

    def registration(self) -> Servicer:
        """How it is registered with a server."""
        return Servicer("expertmesh.v1.TokenizerService", add_TokenizerServiceServicer_to_server, self)

    async def Encode(self, request: EncodeRequest, context: grpc.aio.ServicerContext) -> EncodeResponse:
        """Gives the ids of a batch of texts to classify, cut to the context."""
        tokenizer = self._classifiers()
        check_texts(request.texts)
        if not 0 <= request.max_tokens <= self._context:
            raise InvalidInput(f"max_tokens must be in [0, {self._context}]", "max_tokens")
        characters, context = sum(map(len, request.texts)), request.max_tokens or self._context
        started_s = perf_counter()
        encoded = await _off_loop_if_long(characters, lambda: tokenizer.encode(request.texts, context))
        self._work.done(len(encoded.ids_T), perf_counter() - started_s)
        return EncodeResponse(
            ids=wire.encode(encoded.ids_T),
            lengths=wire.encode(encoded.lengths_B),
            truncated=encoded.truncated_B.tolist(),
        )

    async def EncodePrompt(
        self, request: EncodePromptRequest, context: grpc.aio.ServicerContext
    ) -> EncodePromptResponse:
        """Gives the ids of a prompt to go on from, never cut."""
        tokenizer = self._languages()
        is_chat = request.WhichOneof("prompt") == "chat"
        text = await self._render(request.chat) if is_chat else request.text
        self._check_prompt(text)
        started_s = perf_counter()
        ids = await _off_loop_if_long(len(text), lambda: tokenizer.encode(text, not is_chat))
        self._work.done(len(ids), perf_counter() - started_s)
        if not ids:
            raise InvalidInput("the prompt has no tokens", "prompt")
        if len(ids) > self._context:
            raise InvalidInput(f"the prompt has {len(ids)} tokens; the context has {self._context}", "prompt")
        return EncodePromptResponse(ids=wire.encode(np.array(ids, np.int32)))

    async def Decode(self, request: DecodeRequest, context: grpc.aio.ServicerContext) -> DecodeResponse:
        """Gives the text of token ids."""
        ids_T = wire.decode(request.ids, wire.INT32, (None,), "ids")
        self._check_ids(ids_T)
        return DecodeResponse(text=(await self._decode([ids_T.tolist()]))[0])

    async def DecodeBatch(self, request: DecodeBatchRequest, context: grpc.aio.ServicerContext) -> DecodeBatchResponse:
        """Gives the texts of several id sequences."""
        ids_T = wire.decode(request.ids, wire.INT32, (None,), "ids")
        self._check_ids(ids_T)
        lengths_B = wire.decode_lengths(request.lengths, len(ids_T), MAX_DECODED_TOKENS)
        if len(lengths_B) > MAX_SEQUENCES:
            raise InvalidInput(f"{len(lengths_B)} sequences; at most {MAX_SEQUENCES} in one call", "lengths")
        sequences = [part.tolist() for part in np.split(ids_T, np.cumsum(lengths_B)[:-1])]
        return DecodeBatchResponse(texts=await self._decode(sequences))

    async def _render(self, chat: Chat) -> str:
        if self._template is None:
            raise InvalidInput("the model has no chat template; give it a text to go on from", "messages")
        return await self._template.render([(message.role, message.content) for message in chat.messages])

    async def _decode(self, sequences: list[list[int]]) -> list[str]:
        tokenizer = self._tokenizer
        if isinstance(tokenizer, LanguageTokenizer):
            return await asyncio.to_thread(tokenizer.decode, sequences)
        return [tokenizer.decode(sequence) for sequence in sequences]

    def _classifiers(self) -> Tokenizer:
        if isinstance(self._tokenizer, LanguageTokenizer):
            raise WrongPart("this model generates text and does not classify; use EncodePrompt")
        return self._tokenizer

    def _languages(self) -> LanguageTokenizer:
        if isinstance(self._tokenizer, Tokenizer):
            raise WrongPart("this model classifies texts and does not generate; use Encode")
        return self._tokenizer

    def _check_prompt(self, text: str) -> None:
        """Looks at the bytes alone, so that nothing is spent on a prompt that is too long by far."""
        if not text:
            raise InvalidInput("the prompt is empty", "prompt")
        limit = min(MAX_PROMPT_BYTES, self._context * PROMPT_BYTES_PER_TOKEN + SPARE_PROMPT_BYTES)
        size_bytes = len(text.encode("utf-8", "surrogatepass"))
        if size_bytes > limit:
            raise InvalidInput(
                f"the prompt has {size_bytes} bytes; at most {limit} go with a context of {self._context} tokens",
                "prompt",
            )

    def _check_ids(self, ids_T: wire.AnyArray) -> None:
        if len(ids_T) > MAX_DECODED_TOKENS:
            raise InvalidInput(f"{len(ids_T)} ids; at most {MAX_DECODED_TOKENS} in one call", "ids")
        if ids_T.min() < 0 or ids_T.max() >= self._vocab:
            raise InvalidInput(f"every id must be in [0, {self._vocab})", "ids")


async def _off_loop_if_long(characters: int, work: Callable[[], ResultT]) -> ResultT:
    """Runs work in a thread if it takes long; a thread costs more than short work."""
    return await asyncio.to_thread(work) if characters > LONG_CHARACTERS else work()
