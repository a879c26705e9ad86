"""`Generate`: a request becomes sequences, and their tokens become text, whatever computes them."""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from prometheus_client import Counter, Histogram

from expertmesh.model.spec import ModelSpec
from expertmesh.rpc import request_id as request_ids
from expertmesh.rpc.deadline import Deadline
from expertmesh.serving.batcher import Batcher, Limits
from expertmesh.serving.generation import NO_LOGPROBS, Token, Wish, check_fits
from expertmesh.serving.requests import check_generate, check_tokenize, sampling_of
from expertmesh.telemetry import metrics
from expertmesh.telemetry.logging import event
from expertmesh.tokenization.stream import TextStream
from expertmesh.v1.inference_pb2 import (
    FINISH_REASON_STOP,
    FINISH_REASON_UNSPECIFIED,
    CompleteResponse,
    Completion,
    Contract,
    GenerateRequest,
    GenerateResponse,
    Route,
    TokenizeRequest,
    TokenizeResponse,
    Usage,
)
from expertmesh.v1.tokenizer_pb2 import EncodePromptRequest

DECODE_LIMITS = Limits(pass_texts=512, waiting_texts=2**16, sheds=False)  # a stream under way is not given up
SEED_BITS = 53  # what a JSON number holds exactly in every language


class TokenSource(Protocol):
    """What computes tokens."""

    def tokens(self, wish: Wish, contract: Contract, route: Route) -> AsyncGenerator[Token, None]:
        """The tokens of one sequence as they come; closing the iterator frees whatever it holds."""


class Tokenizing(Protocol):
    """Text to token ids and back."""

    async def encode(self, request: EncodePromptRequest, deadline: Deadline) -> list[int]:
        """Ids of a prompt."""

    async def decode(self, sequences: Sequence[Sequence[int]], deadline: Deadline) -> list[str]:
        """Texts of several id sequences."""


@dataclass(frozen=True)
class _Ended:
    """A choice is over, well or not."""

    error: BaseException | None


@dataclass(frozen=True)
class _Meters:
    """Metrics of one route; to look them up for every token costs more than to count."""

    tokens: Counter
    first_s: Histogram
    next_s: Histogram


@functools.cache
def _meters(route: Route) -> _Meters:
    name = Route.Name(route)
    return _Meters(
        metrics.GENERATED_TOKENS.labels(name),
        metrics.FIRST_TOKEN_SECONDS.labels(name),
        metrics.NEXT_TOKEN_SECONDS.labels(name),
    )


class Generator:
    """Answers `Generate`, `Complete` and `Tokenize`.

    Args:
        spec: The model.
        source: What computes tokens.
        tokenizing: Text to ids and back.
    """

    def __init__(self, spec: ModelSpec, source: TokenSource, tokenizing: Tokenizing) -> None:
        self._spec = spec
        self._source = source
        self._tokenizing = tokenizing
        self._decoder: Batcher[Sequence[int], str] = Batcher(tokenizing.decode, DECODE_LIMITS)

    async def generate(self, request: GenerateRequest, deadline: Deadline) -> AsyncGenerator[GenerateResponse, None]:
        """The answer as it comes; closing the iterator frees whatever it holds.

        Raises:
            InvalidInput: The request is at fault.
            MeshError: It could not be served, or not to its end.
        """
        arrived_s = time.monotonic()
        check_generate(request, self._spec)
        request_id = request_ids.current_or_new()
        prompt = await self._prompt(request, deadline)
        seed = request.seed if request.HasField("seed") else secrets.randbits(SEED_BITS)
        wishes = self._wishes(request, prompt, seed, deadline, arrived_s)
        usage = Usage(prompt_tokens=len(prompt))
        async with aclosing(_merged([self._choice(wish, request) for wish in wishes])) as messages:
            left = len(wishes)
            async for message in messages:
                usage.completion_tokens += len(message.tokens)
                message.request_id, message.seed = request_id, seed
                left -= message.finish_reason != FINISH_REASON_UNSPECIFIED
                if not left:
                    message.usage.CopyFrom(usage)
                yield message
        event("generated", request_id=request_id, prompt=len(prompt), tokens=usage.completion_tokens)

    async def complete(self, request: GenerateRequest, deadline: Deadline) -> CompleteResponse:
        """The whole answer.

        Raises:
            MeshError: As `generate`.
        """
        response = CompleteResponse()
        choices: dict[int, Completion] = {}
        texts: dict[int, list[str]] = {}
        async with aclosing(self.generate(request, deadline)) as messages:
            async for message in messages:
                if message.choice not in choices:
                    choices[message.choice] = Completion(exact=True)
                    texts[message.choice] = []
                choice = choices[message.choice]
                texts[message.choice].append(message.text)
                choice.tokens.extend(message.tokens)
                choice.finish_reason = message.finish_reason
                choice.exact = choice.exact and message.exact
                choice.route = max(choice.route, message.route)
                choice.profile = message.profile
                if message.missing_experts:  # those of all the tokens before as well
                    del choice.missing_experts[:]
                    choice.missing_experts.extend(message.missing_experts)
                response.request_id, response.seed = message.request_id, message.seed
                response.usage.CopyFrom(message.usage)
        for number, choice in sorted(choices.items()):
            choice.text = "".join(texts[number])
            response.choices.append(choice)
        return response

    async def tokenize(self, request: TokenizeRequest, deadline: Deadline) -> TokenizeResponse:
        """The ids of a prompt, as `generate` would see them."""
        check_tokenize(request)
        return TokenizeResponse(ids=await self._tokenizing.encode(_encoding(request), deadline))

    async def texts(self, ids: Sequence[int], deadline: Deadline) -> list[str]:
        """The text of every single token."""
        return await self._decoder.submit([[id_] for id_ in ids], deadline)

    async def _prompt(self, request: GenerateRequest, deadline: Deadline) -> list[int]:
        if request.HasField("ids"):
            return list(request.ids.ids)
        return await self._tokenizing.encode(_encoding(request), deadline)

    def _wishes(
        self, request: GenerateRequest, prompt: list[int], seed: int, deadline: Deadline, arrived_s: float
    ) -> list[Wish]:
        max_tokens = check_fits(len(prompt), request.max_tokens, self._spec.context)
        end_ids = frozenset(request.stop_ids) | frozenset(() if request.ignore_end else self._spec.head.end_ids)
        logprobs = request.logprobs if request.HasField("logprobs") else NO_LOGPROBS
        sampling = sampling_of(request, seed)
        return [
            Wish(prompt, sampling, request.first_choice + choice, max_tokens, end_ids, logprobs, deadline, arrived_s)
            for choice in range(request.n if request.HasField("n") else 1)
        ]

    async def _choice(self, wish: Wish, request: GenerateRequest) -> AsyncGenerator[GenerateResponse, None]:
        stream = TextStream(request.stop, self._spec.embedding.vocab)
        latest_s, is_first = wish.arrived_s, True
        async with aclosing(self._source.tokens(wish, request.contract, request.route)) as tokens:
            async for token in tokens:
                meters = _meters(token.provenance.route)
                (meters.first_s if is_first else meters.next_s).observe(token.at_s - latest_s)
                latest_s, is_first = token.at_s, False
                text = await self._text(stream, token, wish.deadline)
                finish = FINISH_REASON_STOP if stream.stopped else token.finish
                provenance = token.provenance
                yield GenerateResponse(
                    choice=wish.choice,
                    text=text,
                    tokens=[token.drawn],
                    finish_reason=finish,
                    route=provenance.route,
                    exact=provenance.exact,
                    profile=provenance.profile,
                    missing_experts=provenance.missing_experts() if provenance.missing else None,
                )
                meters.tokens.inc()
                if finish != FINISH_REASON_UNSPECIFIED:
                    return

    async def _text(self, stream: TextStream, token: Token, deadline: Deadline) -> str:
        """What a token adds to the text; the one that ends the answer adds nothing of its own."""
        text = ""
        if token.finish != FINISH_REASON_STOP:
            stream.push(token.drawn.id)
            if windows := stream.windows():
                text = stream.take(await self._decoder.submit(windows, deadline))
        if token.finish != FINISH_REASON_UNSPECIFIED and not stream.stopped:
            text += stream.finish()
        return text


def _encoding(request: GenerateRequest | TokenizeRequest) -> EncodePromptRequest:
    if request.HasField("chat"):
        return EncodePromptRequest(chat=request.chat)
    return EncodePromptRequest(text=request.text)


async def _merged(streams: Sequence[AsyncGenerator[GenerateResponse, None]]) -> AsyncGenerator[GenerateResponse, None]:
    """The messages of all streams as they come; ends them all when one fails or the caller leaves."""
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for sole in only:
                yield sole
        return
    messages: asyncio.Queue[GenerateResponse | _Ended] = asyncio.Queue()

    async def follow(stream: AsyncGenerator[GenerateResponse, None]) -> None:
        error: BaseException | None = None
        try:
            async with aclosing(stream) as opened:
                async for message in opened:
                    messages.put_nowait(message)
        except Exception as failure:
            error = failure
        messages.put_nowait(_Ended(error))

    tasks = [asyncio.create_task(follow(stream)) for stream in streams]
    try:
        left = len(tasks)
        while left:
            message = await messages.get()
            if not isinstance(message, _Ended):
                yield message
                continue
            if message.error is not None:
                raise message.error
            left -= 1
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
