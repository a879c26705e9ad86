"""How OpenAI writes an answer: the objects of its two APIs, whole and in pieces."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from expertmesh.v1.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, FinishReason
from expertmesh.v1.sampling_pb2 import TokenLogprob, TokenLogprobs

FINISH_REASONS = {FINISH_REASON_STOP: "stop", FINISH_REASON_LENGTH: "length"}
LEAST_LOGPROB = -9999.0  # OpenAI's own way to write minus infinity, which JSON cannot
NOT_WHOLE = "\ufffd"
Texts = Mapping[int, str]


class Shape(Protocol):
    """One of the two APIs.

    Attributes:
        prefix: What ids of answers begin with.
        whole: The kind of a whole answer.
        piece: The kind of a piece of one.
    """

    prefix: str
    whole: str
    piece: str

    def choice(self, index: int, text: str, logprobs: Any, finish: FinishReason) -> dict[str, Any]:
        """A whole choice."""

    def delta(self, index: int, text: str, is_first: bool, logprobs: Any, finish: FinishReason) -> dict[str, Any]:
        """What is added to a choice."""

    def logprobs(self, tokens: Sequence[TokenLogprobs], texts: Texts, most: int, offset: int) -> dict[str, Any]:
        """What is told of tokens.

        Args:
            tokens: The tokens.
            texts: The text of every id among them.
            most: How many of the likeliest were asked for.
            offset: Characters of the choice's tokens before these.
        """


class CompletionShape:
    """`/v1/completions`."""

    prefix = "cmpl"
    whole = piece = "text_completion"

    def choice(self, index: int, text: str, logprobs: Any, finish: FinishReason) -> dict[str, Any]:
        """A whole choice."""
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": FINISH_REASONS.get(finish)}

    def delta(self, index: int, text: str, is_first: bool, logprobs: Any, finish: FinishReason) -> dict[str, Any]:
        """What is added looks as the whole does."""
        return self.choice(index, text, logprobs, finish)

    def logprobs(self, tokens: Sequence[TokenLogprobs], texts: Texts, most: int, offset: int) -> dict[str, Any]:
        """Four lists, one entry for each token; two tokens of the same text share an entry, the likelier one's."""
        chosen = [texts[token.id] for token in tokens]
        return {
            "tokens": chosen,
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": [_top(token, texts) for token in tokens] if most else None,
            "text_offset": [offset + sum(map(len, chosen[:place])) for place in range(len(chosen))],
        }


class ChatShape:
    """`/v1/chat/completions`."""

    prefix = "chatcmpl"
    whole = "chat.completion"
    piece = "chat.completion.chunk"

    def choice(self, index: int, text: str, logprobs: Any, finish: FinishReason) -> dict[str, Any]:
        """A whole choice, which is a message."""
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": FINISH_REASONS.get(finish)}

    def delta(self, index: int, text: str, is_first: bool, logprobs: Any, finish: FinishReason) -> dict[str, Any]:
        """What is added to the message; the first piece tells whose it is."""
        delta = {"role": "assistant", "content": text} if is_first else {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": FINISH_REASONS.get(finish)}

    def logprobs(self, tokens: Sequence[TokenLogprobs], texts: Texts, most: int, offset: int) -> dict[str, Any]:
        """One object for each token."""
        content = [
            _told(token, texts) | {"top_logprobs": [_told(top, texts) for top in token.top[:most]]} for token in tokens
        ]
        return {"content": content, "refusal": None}


def _told(token: TokenLogprob | TokenLogprobs, texts: Texts) -> dict[str, Any]:
    text = texts[token.id]
    # A piece of a character has no text of its own, and its bytes are not known here.
    data = None if NOT_WHOLE in text else list(text.encode())
    return {"token": text, "logprob": _number(token.logprob), "bytes": data}


def _top(token: TokenLogprobs, texts: Texts) -> dict[str, float]:
    likeliest: dict[str, float] = {}
    for one in token.top:
        likeliest.setdefault(texts[one.id], _number(one.logprob))
    likeliest.setdefault(texts[token.id], _number(token.logprob))  # told even if it is not among the likeliest
    return likeliest


def _number(logprob: float) -> float:
    return max(logprob, LEAST_LOGPROB) if math.isfinite(logprob) else LEAST_LOGPROB
