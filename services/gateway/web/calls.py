"""What a client of OpenAI asks for, as requests of the contract.

The fields are those of OpenAI's API, with extensions of the usual names (`top_k`, `min_p`, `repetition_penalty`,
`stop_token_ids`, `ignore_eos`) and the two of this system, `contract` and `route`. Fields that would change the answer
but are not offered must be absent or neutral, and `null` is as good as absent. What is dropped without a word is who
asks and how the work is kept or hurried, none of which the tokens of an answer depend on (`IGNORED`).
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

from .fields import Fields
from .infer import CONTRACTS
from .prompts import read_chat, read_prompts

ROUTES = {"mesh": inference_pb2.ROUTE_MESH, "full-model": inference_pb2.ROUTE_FULL_MODEL}
# Fields that say who asks and what is kept, and two hints at how much to say, which no chat template is given here.
IGNORED = (
    *("user", "metadata", "safety_identifier", "service_tier"),
    *("prompt_cache_key", "prompt_cache_retention", "prompt_cache_options"),
    *("reasoning_effort", "verbosity"),
)
NO_TOOLS = "no tools are called here: leave it out, and describe them in a message if the model is to know them"


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
    fields.neutral("best_of", base.n, otherwise="make it the same as n, or leave it out")
    fields.neutral("echo", False, otherwise="leave it out, and put the prompt before the text yourself")
    fields.neutral("suffix", "", otherwise="the model only continues: leave it out")
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
    fields.neutral("tools", [], otherwise=NO_TOOLS)
    fields.neutral("tool_choice", "none", "auto", otherwise=NO_TOOLS)
    fields.flag("parallel_tool_calls")
    fields.neutral("functions", [], otherwise=NO_TOOLS)
    fields.neutral("function_call", "none", "auto", otherwise=NO_TOOLS)
    text_only = "the model writes text and nothing holds it to a form: leave it out, and ask for the form in a message"
    fields.neutral("response_format", {"type": "text"}, otherwise=text_only)
    fields.neutral("modalities", ["text"], otherwise='the model writes text: make it ["text"], or leave it out')
    fields.flag("store")  # nothing is stored either way
    return _finish(fields, base, [prompt], (top or 0) if logprobs else None)


def _read_sampling(fields: Fields) -> GenerateRequest:
    """What both routes have in common; limits are those that the contract names."""
    request = GenerateRequest(
        temperature=fields.number("temperature", 0, MAX_TEMPERATURE),
        top_k=fields.integer("top_k", 0),
        top_p=fields.number("top_p", 0, 1, above=True),
        min_p=fields.number("min_p", 0, 1),
        repetition_penalty=fields.number("repetition_penalty", 0, MAX_PENALTY, above=True),
        seed=fields.seed("seed"),
        stop=fields.strings("stop", MAX_STOPS),
        stop_ids=fields.integers("stop_token_ids", MAX_STOP_IDS),
        ignore_end=fields.flag("ignore_eos"),
        n=fields.integer("n", 1, MAX_CHOICES) or 1,
        contract=fields.choice("contract", CONTRACTS, inference_pb2.CONTRACT_EXACT),
        route=fields.choice("route", ROUTES, inference_pb2.ROUTE_MESH),
    )
    fields.neutral("presence_penalty", 0, otherwise="leave it out, or give repetition_penalty instead")
    fields.neutral("frequency_penalty", 0, otherwise="leave it out, or give repetition_penalty instead")
    fields.neutral("logit_bias", {}, otherwise="leave it out: every token keeps the logit that the model gives it")
    fields.neutral("min_tokens", 0, otherwise="leave it out, or set ignore_eos to go on until max_tokens")
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
