from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from time import perf_counter

import numpy as np
import pytest

from expertmesh.errors import InvalidInput
from expertmesh.model.spec import AttentionSpec, EmbeddingSpec, ExpertSpec, HeadSpec, ModelSpec, RouterSpec
from expertmesh.serving.requests import (
    MAX_MESSAGES,
    MAX_PROMPT_BYTES,
    MAX_STOP_BYTES,
    check_generate,
    check_sampling,
    check_tokenize,
    sampling_of,
)
from expertmesh.v1 import inference_pb2 as inference
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds, TokenizeRequest
from expertmesh.v1.tokenizer_pb2 import Chat, ChatMessage

VOCAB, CONTEXT = 100, 32
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
SPEC = ModelSpec(
    width=8,
    layers=1,
    context=CONTEXT,
    embedding=EmbeddingSpec(vocab=VOCAB, learned_positions=False),
    attention=AttentionSpec(heads=2, kind="grouped", kv_heads=1, head_width=4),
    router=RouterSpec(experts=2, top_k=1),
    expert=ExpertSpec(width=4),
    head=HeadSpec(kind="language"),
)

Change = Callable[[GenerateRequest], object]


def chat(*messages: tuple[str, str]) -> Chat:
    return Chat(messages=[ChatMessage(role=role, content=content) for role, content in messages])


def field_at_fault(request: GenerateRequest | TokenizeRequest) -> str:
    with pytest.raises(InvalidInput) as caught:
        check_generate(request, SPEC) if isinstance(request, GenerateRequest) else check_tokenize(request)
    assert 0 < len(str(caught.value)) < 200
    return caught.value.field


# A prompt.

GOOD_PROMPTS = {
    "a character": {"text": "a"},
    "a line break": {"text": "\n"},
    "the longest text": {"text": "x" * MAX_PROMPT_BYTES},
    "the longest text in two bytes": {"text": "é" * (MAX_PROMPT_BYTES // 2)},
    "a message": {"chat": chat(("user", "Hi"))},
    "an empty message": {"chat": chat(("user", ""))},
    "the most messages": {"chat": chat(*[("user", "Hi")] * MAX_MESSAGES)},
    "the longest messages": {"chat": chat(("user", "x" * (MAX_PROMPT_BYTES - 9)), ("user", "y"))},
}
GOOD_IDS = {
    "an id": {"ids": TokenIds(ids=[0])},
    "the most ids": {"ids": TokenIds(ids=[VOCAB - 1] * (CONTEXT - 1))},
}
BAD_PROMPTS = {
    "none": ({}, "prompt"),
    "empty text": ({"text": ""}, "text"),
    "too long a text": ({"text": "x" * (MAX_PROMPT_BYTES + 1)}, "text"),
    "too long a text in two bytes": ({"text": "é" * (MAX_PROMPT_BYTES // 2) + "x"}, "text"),
    "no messages": ({"chat": Chat()}, "chat.messages"),
    "too many messages": ({"chat": chat(*[("user", "Hi")] * (MAX_MESSAGES + 1))}, "chat.messages"),
    "a message without a role": ({"chat": chat(("user", "Hi"), ("", "Hi"))}, "chat.messages[1].role"),
    "too long messages": ({"chat": chat(("user", "x" * (MAX_PROMPT_BYTES - 8)), ("user", "y"))}, "chat"),
    "a long role": ({"chat": chat(("x" * (MAX_PROMPT_BYTES + 1), ""))}, "chat"),
}
BAD_IDS = {
    "no ids": ([], "ids"),
    "no room for a token": ([1] * CONTEXT, "ids"),
    "beyond the vocabulary": ([1, 2, VOCAB], "ids[2]"),
    "negative": ([1, -1], "ids[1]"),
    "the lowest": ([-(2**31)], "ids[0]"),
}


@pytest.mark.parametrize("prompt", [*GOOD_PROMPTS.values(), *GOOD_IDS.values()], ids=[*GOOD_PROMPTS, *GOOD_IDS])
def test_prompts_that_are_taken(prompt: dict[str, object]) -> None:
    check_generate(GenerateRequest(**prompt), SPEC)  # type: ignore[arg-type]


@pytest.mark.parametrize(("prompt", "field"), BAD_PROMPTS.values(), ids=BAD_PROMPTS.keys())
def test_prompts_that_are_refused(prompt: dict[str, object], field: str) -> None:
    assert field_at_fault(GenerateRequest(**prompt)) == field  # type: ignore[arg-type]


@pytest.mark.parametrize(("ids", "field"), BAD_IDS.values(), ids=BAD_IDS.keys())
def test_ids_that_are_refused(ids: list[int], field: str) -> None:
    assert field_at_fault(GenerateRequest(ids=TokenIds(ids=ids))) == field


@pytest.mark.parametrize("prompt", GOOD_PROMPTS.values(), ids=GOOD_PROMPTS.keys())
def test_what_can_be_tokenized(prompt: dict[str, object]) -> None:
    check_tokenize(TokenizeRequest(**prompt))  # type: ignore[arg-type]


@pytest.mark.parametrize(("prompt", "field"), BAD_PROMPTS.values(), ids=BAD_PROMPTS.keys())
def test_what_cannot_be_tokenized(prompt: dict[str, object], field: str) -> None:
    assert field_at_fault(TokenizeRequest(**prompt)) == field  # type: ignore[arg-type]


# What else a call says.

GOOD_VALUES: dict[str, list[object]] = {
    "max_tokens": [1, 2**31 - 1],
    "temperature": [0, SMALLEST, 1, 100],
    "top_k": [0, 1, VOCAB + 1, 2**31 - 1],
    "top_p": [SMALLEST, 0.5, 1],
    "min_p": [0, 0.5, 1],
    "repetition_penalty": [SMALLEST, 1, 100],
    "seed": [0, 2**64 - 1],
    "stop": [["x"] * 16, ["x" * MAX_STOP_BYTES], ["é" * (MAX_STOP_BYTES // 2)], ["\n"]],
    "stop_ids": [[0, VOCAB - 1], [1] * 64],
    "n": [1, 16],
    "logprobs": [0, 20],
    "contract": [inference.CONTRACT_MESH_ONLY, inference.CONTRACT_DEGRADED_OK],
    "route": [inference.ROUTE_MESH, inference.ROUTE_FULL_MODEL],
}
BAD_VALUES: dict[str, list[object]] = {
    "max_tokens": [0, -1, -(2**31)],
    "temperature": [math.nan, math.inf, -math.inf, -SMALLEST, -1, 100.001],
    "top_k": [-1, -(2**31)],
    "top_p": [math.nan, math.inf, 0, -0.5, 1.001],
    "min_p": [math.nan, math.inf, -SMALLEST, 1.001],
    "repetition_penalty": [math.nan, math.inf, 0, -1, 100.001],
    "stop": [["x"] * 17],
    "stop[1]": [["x", ""], ["x", "x" * (MAX_STOP_BYTES + 1)], ["x", "é" * (MAX_STOP_BYTES // 2) + "x"]],
    "stop_ids": [[1] * 65],
    "stop_ids[1]": [[0, -1], [0, VOCAB]],
    "n": [0, -1, 17, 2**31 - 1],
    "logprobs": [-1, 21],
    "contract": [99],
    "route": [99, inference.ROUTE_DEGRADED],
}


def pairs(values: dict[str, list[object]]) -> list[tuple[str, object]]:
    return [(field, value) for field, listed in values.items() for value in listed]


@pytest.mark.parametrize(("field", "value"), pairs(GOOD_VALUES))
def test_values_that_are_taken(field: str, value: object) -> None:
    check_generate(GenerateRequest(text="Hi", **{field: value}), SPEC)  # type: ignore[arg-type]


@pytest.mark.parametrize(("field", "value"), pairs(BAD_VALUES))
def test_values_that_are_refused(field: str, value: object) -> None:
    plain = field.partition("[")[0]
    assert field_at_fault(GenerateRequest(text="Hi", **{plain: value})) == field  # type: ignore[arg-type]


def test_mesh_only_does_not_go_with_the_full_model() -> None:
    request = GenerateRequest(text="Hi", contract=inference.CONTRACT_MESH_ONLY, route=inference.ROUTE_FULL_MODEL)
    assert field_at_fault(request) == "contract"


def test_two_to_the_31_tokens_on_the_wire_are_refused() -> None:
    data = GenerateRequest(text="Hi").SerializeToString() + b"\x20\x80\x80\x80\x80\x08"  # field 4 as a varint
    assert field_at_fault(GenerateRequest.FromString(data)) == "max_tokens"


BULK: dict[str, Change] = {
    "stop": lambda request: request.stop.extend([str(number) for number in range(10**6)]),
    "stop_ids": lambda request: request.stop_ids.extend(range(10**6)),
    "ids": lambda request: request.ids.ids.extend([1] * 10**6),
    "chat.messages": lambda request: request.chat.messages.extend([ChatMessage(role="user")] * 10**5),
    "text": lambda request: setattr(request, "text", "x" * 10**7),
    "stop[0]": lambda request: request.stop.append("x" * 10**7),
}


@pytest.mark.parametrize(("field", "fill"), BULK.items())
def test_a_huge_request_is_refused_at_once(field: str, fill: Change) -> None:
    request = GenerateRequest(text="Hi")
    fill(request)
    took_s = []
    for _ in range(5):  # the best of some: the machine may be busy
        started_s = perf_counter()
        assert field_at_fault(request) == field
        took_s.append(perf_counter() - started_s)
    assert min(took_s) < 0.05


# Defaults.


def test_what_is_left_out_has_its_default() -> None:
    sampling = sampling_of(GenerateRequest(text="Hi"), 7)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1, 0, 1)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.seed) == (0, 1, 7)
    check_sampling(sampling)


def test_what_is_said_is_kept_zero_too() -> None:
    request = GenerateRequest(
        text="Hi", temperature=0, top_k=5, top_p=0.5, min_p=0.25, repetition_penalty=2, seed=2**64 - 1
    )
    sampling = sampling_of(request, request.seed)
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0, 5, 0.5)
    assert (sampling.min_p, sampling.repetition_penalty, sampling.seed) == (0.25, 2, 2**64 - 1)


def test_a_callers_zero_is_not_taken_for_the_default() -> None:
    assert sampling_of(GenerateRequest(text="Hi", top_p=0), 0).top_p == 0


def test_the_checks_need_no_torch() -> None:
    code = "import sys, expertmesh.serving.requests; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
