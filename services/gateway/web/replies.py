"""Answers of the contract as replies to clients of OpenAI: whole, or as the objects of a stream."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from expertmesh.errors import CorruptReply, InvalidInput
from expertmesh.serving.inference import route_name, told_missing
from expertmesh.v1.inference_pb2 import ROUTE_UNSPECIFIED, CompleteResponse, Completion, GenerateResponse, Route, Usage
from expertmesh.v1.sampling_pb2 import TokenLogprobs

from .calls import Call
from .shapes import Shape

TokenTexts = Callable[[list[int]], Awaitable[list[str]]]


@dataclass
class _Origin:
    """How the tokens of one answer or of several came to be."""

    route: Route = ROUTE_UNSPECIFIED
    exact: bool = True
    profile: str = ""
    missing: set[tuple[int, int]] = field(default_factory=set)

    def add(self, part: Completion | GenerateResponse) -> None:
        self.route = max(self.route, part.route)  # in the order mesh, full model, degraded
        self.exact &= part.exact
        self.profile = part.profile
        self.missing.update((one.layer, one.expert) for one in part.missing_experts)

    def told(self, seed: int) -> dict[str, Any]:
        how = {"route": route_name(self.route), "exact": self.exact, "profile": self.profile, "seed": seed}
        return how | told_missing(self.missing)


class Replies:
    """Writes the reply to one call.

    Args:
        call: What was asked for.
        shape: Which API's objects.
        request_id: What the reply is called.
        model: Name of the model.
        token_texts: Gives the text of each of some token ids; None where that is not offered.

    Raises:
        InvalidInput: The call asks for logprobs and they are not offered.
    """

    def __init__(self, call: Call, shape: Shape, request_id: str, model: str, token_texts: TokenTexts | None) -> None:
        if call.logprobs is not None and token_texts is None:
            raise InvalidInput("logprobs are not offered here; leave them out", "logprobs")
        self._call = call
        self._shape = shape
        self._token_texts = token_texts
        self._head = {"id": f"{shape.prefix}-{request_id}", "created": int(time.time()), "model": model}

    async def whole(self, responses: Sequence[CompleteResponse]) -> dict[str, Any]:
        """The reply at once.

        Args:
            responses: One for each prompt, in their order.
        """
        origin, usage, choices = _Origin(), Usage(), []
        for prompt, response in enumerate(responses):
            _add_usage(usage, response.usage)
            for number, choice in enumerate(response.choices):
                origin.add(choice)
                index = prompt * self._call.choices + number
                logprobs, _ = await self._logprobs(choice.tokens, 0)
                choices.append(self._shape.choice(index, choice.text, logprobs, choice.finish_reason))
        return {
            **self._head,
            "object": self._shape.whole,
            "system_fingerprint": _fingerprint(origin.profile),
            "choices": choices,
            "usage": _usage(usage),
            "expertmesh": origin.told(responses[0].seed),
        }

    async def pieces(
        self, messages: AsyncGenerator[tuple[int, GenerateResponse], None]
    ) -> AsyncGenerator[dict[str, Any], None]:
        """The objects of a stream. The last piece of each choice carries its finish reason and how it came to be.

        Args:
            messages: Messages with the number of their prompt; closed at the end, whatever happens.

        Raises:
            CorruptReply: The messages end before every choice is finished.
        """
        going: dict[int, _Origin] = {}
        offsets: defaultdict[int, int] = defaultdict(int)
        finished: set[int] = set()
        usage, fingerprint = Usage(), None
        async with aclosing(messages):
            async for prompt, message in messages:
                if message.HasField("usage"):
                    _add_usage(usage, message.usage)
                index = prompt * self._call.choices + message.choice
                is_first = index not in going
                origin = going.setdefault(index, _Origin())
                if index in finished:  # there is no more of this choice, only its usage
                    continue
                origin.add(message)
                fingerprint = _fingerprint(message.profile)
                logprobs, offsets[index] = await self._logprobs(message.tokens, offsets[index])
                if not (is_first or message.text or message.finish_reason or (logprobs and message.tokens)):
                    continue
                piece = self._shape.delta(index, message.text, is_first, logprobs, message.finish_reason)
                told = self._piece([piece], fingerprint)
                if message.finish_reason:
                    finished.add(index)
                    told["expertmesh"] = origin.told(message.seed)
                yield told
        if len(finished) != len(self._call.requests) * self._call.choices:
            raise CorruptReply("the answer ended before it was finished")
        if self._call.include_usage:
            yield self._piece([], fingerprint) | {"usage": _usage(usage)}

    def _piece(self, choices: list[dict[str, Any]], fingerprint: str | None) -> dict[str, Any]:
        piece = {
            **self._head,
            "object": self._shape.piece,
            "system_fingerprint": fingerprint,
            "choices": choices,
        }
        return piece | {"usage": None} if self._call.include_usage else piece

    async def _logprobs(self, tokens: Sequence[TokenLogprobs], offset: int) -> tuple[dict[str, Any] | None, int]:
        """What is told of tokens, if anything is, and the offset of those after them."""
        if self._call.logprobs is None:
            return None, offset
        assert self._token_texts is not None
        ids = sorted({token.id for token in tokens} | {top.id for token in tokens for top in token.top})
        texts = dict(zip(ids, await self._token_texts(ids) if ids else [], strict=True))
        told = self._shape.logprobs(tokens, texts, self._call.logprobs, offset)
        return told, offset + sum(len(texts[token.id]) for token in tokens)


def _add_usage(total: Usage, more: Usage) -> None:
    total.prompt_tokens += more.prompt_tokens
    total.completion_tokens += more.completion_tokens


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _fingerprint(profile: str) -> str | None:
    """The last word of a profile, which sums it up."""
    return profile.split()[-1] if profile.split() else None
