"""What a client of OpenAI asks for, as requests of the contract.

The fields are those of OpenAI's API, with extensions of the usual names (`top_k`, `min_p`, `repetition_penalty`,
`stop_token_ids`, `ignore_eos`) and the two of this system, `contract` and `route`. Fields that would change the answer
but are not offered must be absent or neutral; nothing is dropped without a word.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from expertmesh.rpc.deadline import MAX_TIMEOUT_S
from expertmesh.serving.requests import (
    GENERATE_TIMEOUT_S,
    MAX_CHOICES,
    MAX_LOGPROBS,
    MAX_PENALTY,
    MAX_STOP_IDS,
    MAX_STOPS,
    MAX_TEMPERATURE,
)
from expertmesh.v1 import inference_pb2
from expertmesh.v1.inference_pb2 import GenerateRequest

from .fields import UINT64_MAX, Fields
from .infer import CONTRACTS
from .prompts import read_chat, read_prompts

ROUTES = {"mesh": inference_pb2.ROUTE_MESH, "full-model": inference_pb2.ROUTE_FULL_MODEL}
# Fields that say who asks, not what.
IGNORED = ("user", "metadata", "safety_identifier", "prompt_cache_key", "service_tier")


@dataclass(frozen=True)
class Call:
    """One HTTP request for texts.

    Attributes:
        requests: One for each prompt.
        choices: Answers to each of them.
        logprobs: How many of the likeliest tokens to tell at each place; None to tell nothing of them.
        stream: Whether to answer token by token.
        include_usage: Whether a stream ends with its usage.
        timeout_s: How long it may take.
    """

    requests: list[GenerateRequest]
    choices: int
    logprobs: int | None
    stream: bool
    include_usage: bool
    timeout_s: float


def read_completion(fields: Fields, context: int) -> Call:
    """The call that the fields of `/v1/completions` ask for.

    Args:
        fields: Without `model`.
        context: Most tokens that a prompt may have; 0 if that is not known here.

    Raises:
        InvalidInput: Names the field at fault.
    """
    prompts = read_prompts(fields, context)
    base = _read_sampling(fields)
    max_tokens = fields.integer("max_tokens", 1)
    base.max_tokens = 16 if max_tokens is None else max_tokens
    logprobs = fields.integer("logprobs", 0, 5)
    fields.neutral("best_of", base.n)
    fields.neutral("echo", False)
    fields.neutral("suffix", "")
    return _finish(fields, base, prompts, logprobs)


def read_chat_completion(fields: Fields) -> Call:
    """The call that the fields of `/v1/chat/completions` ask for.

    Args:
        fields: Without `model`.

    Raises:
        InvalidInput: Names the field at fault.
    """
    prompt = GenerateRequest(chat=read_chat(fields))
    base = _read_sampling(fields)
    old, new = fields.integer("max_tokens", 1), fields.integer("max_completion_tokens", 1)
    if old is not None and new is not None and old != new:
        raise fields.error("max_tokens", "differs from max_completion_tokens; give one of them")
    if (max_tokens := old if new is None else new) is not None:
        base.max_tokens = max_tokens
    logprobs, top = fields.flag("logprobs"), fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    if top is not None and not logprobs:
        raise fields.error("top_logprobs", "needs logprobs to be true")
    fields.neutral("tools", [])
    fields.neutral("tool_choice", "none", "auto")
    fields.neutral("parallel_tool_calls", True, False)
    fields.neutral("functions", [])
    fields.neutral("function_call", "none", "auto")
    fields.neutral("response_format", {"type": "text"})
    fields.neutral("modalities", ["text"])
    fields.neutral("store", False)
    return _finish(fields, base, [prompt], (top or 0) if logprobs else None)


def _read_sampling(fields: Fields) -> GenerateRequest:
    """What both routes have in common; limits are those that the contract names."""
    request = GenerateRequest(
        temperature=fields.number("temperature", 0, MAX_TEMPERATURE),
        top_k=fields.integer("top_k", 0),
        top_p=fields.number("top_p", 0, 1, above=True),
        min_p=fields.number("min_p", 0, 1),
        repetition_penalty=fields.number("repetition_penalty", 0, MAX_PENALTY, above=True),
        seed=fields.integer("seed", 0, UINT64_MAX),
        stop=fields.strings("stop", MAX_STOPS),
        stop_ids=fields.integers("stop_token_ids", MAX_STOP_IDS),
        ignore_end=fields.flag("ignore_eos"),
        n=fields.integer("n", 1, MAX_CHOICES) or 1,
        contract=fields.choice("contract", CONTRACTS, inference_pb2.CONTRACT_EXACT),
        route=fields.choice("route", ROUTES, inference_pb2.ROUTE_MESH),
    )
    fields.neutral("presence_penalty", 0)
    fields.neutral("frequency_penalty", 0)
    fields.neutral("logit_bias", {})
    return request


def _finish(fields: Fields, base: GenerateRequest, prompts: list[GenerateRequest], logprobs: int | None) -> Call:
    stream = fields.flag("stream")
    include_usage = False
    if (options := fields.object("stream_options")) is not None:
        if not stream:
            raise fields.error("stream_options", "needs stream to be true")
        include_usage = options.flag("include_usage")
        options.flag("include_obfuscation")  # hides lengths from who listens to encrypted traffic; there is none
        options.end()
    timeout_s = fields.number("timeout_s", 0, MAX_TIMEOUT_S, above=True)
    fields.ignore(IGNORED)
    fields.end()
    if logprobs is not None:
        base.logprobs = logprobs
    if len(prompts) > 1 and not base.HasField("seed"):  # one seed for all, so that the reply can tell it
        base.seed = secrets.randbits(53)  # every JSON reader holds it exactly
    for prompt in prompts:
        prompt.MergeFrom(base)
    return Call(prompts, base.n, logprobs, stream, include_usage, timeout_s or GENERATE_TIMEOUT_S)
