from __future__ import annotations

from typing import Any

import openai
import pytest

from expertmesh.serving.requests import check_prompt
from expertmesh.v1 import inference_pb2 as pb
from tests.doubles.scripted import Scripted
from tests.openai_gateway import MODEL, http_client, openai_client

HI: list[Any] = [{"role": "user", "content": "hi"}]
# What may be said on both routes and changes nothing.
BOTH: list[dict[str, Any]] = [
    {"user": "me"},
    {"presence_penalty": 0, "frequency_penalty": 0.0},
    {"logit_bias": {}},
    {"stop": ""},
    {"stop": []},
    {"stop": None},
    {"extra_body": {"min_tokens": 0}},
]
COMPLETIONS = [{"best_of": 1}, {"best_of": 1, "n": 1}, {"echo": False}, {"suffix": ""}]
CHATS = [
    {"store": True},
    {"store": False},
    {"reasoning_effort": "low"},
    {"verbosity": "high"},
    {"prompt_cache_key": "a", "prompt_cache_retention": "24h", "prompt_cache_options": {}},
    {"safety_identifier": "me", "metadata": {"a": "b"}, "service_tier": "auto"},
    {"parallel_tool_calls": True},
    {"parallel_tool_calls": False},
    {"tools": [], "tool_choice": "none"},
    {"tools": [], "tool_choice": "auto"},
    {"tool_choice": "auto"},
    {"functions": [], "function_call": "none"},
    {"response_format": {"type": "text"}},
    {"modalities": ["text"]},
]
# Every field of the two routes that may be left out.
OPTIONAL = {
    "shared": (
        *("frequency_penalty", "logit_bias", "logprobs", "max_tokens", "model", "n", "presence_penalty", "seed"),
        *("stop", "stream", "stream_options", "temperature", "top_p", "user"),
        *("top_k", "min_p", "repetition_penalty", "stop_token_ids", "ignore_eos", "min_tokens"),
        *("contract", "route", "timeout_s"),
    ),
    "/v1/completions": ("best_of", "echo", "suffix"),
    "/v1/chat/completions": (
        *("audio", "function_call", "functions", "max_completion_tokens", "metadata", "modalities", "moderation"),
        *("parallel_tool_calls", "prediction", "prompt_cache_key", "prompt_cache_options", "prompt_cache_retention"),
        *("reasoning_effort", "response_format", "safety_identifier", "service_tier", "store", "tool_choice"),
        *("tools", "top_logprobs", "verbosity", "web_search_options"),
    ),
}


@pytest.mark.parametrize("extra", [*BOTH, *COMPLETIONS], ids=str)
async def test_neutral_fields_of_a_completion_change_nothing(extra: dict[str, Any]) -> None:
    double = Scripted()
    async with openai_client(double) as client:
        await client.completions.create(model=MODEL, prompt="Say")
        await client.completions.create(model=MODEL, prompt="Say", **extra)
    plain, request = double.requests
    assert request == plain


@pytest.mark.parametrize("extra", [*BOTH, *CHATS], ids=str)
async def test_neutral_fields_of_a_chat_change_nothing(extra: dict[str, Any]) -> None:
    double = Scripted()
    async with openai_client(double) as client:
        await client.chat.completions.create(model=MODEL, messages=HI)
        await client.chat.completions.create(model=MODEL, messages=HI, **extra)
    plain, request = double.requests
    assert request == plain


@pytest.mark.parametrize(
    ("path", "body"), [("/v1/completions", {"prompt": "a"}), ("/v1/chat/completions", {"messages": HI})]
)
async def test_null_is_as_good_as_not_given(path: str, body: dict[str, Any]) -> None:
    double = Scripted()
    async with http_client(double) as http:
        await http.post(path, json=body)
        reply = await http.post(path, json=body | dict.fromkeys((*OPTIONAL["shared"], *OPTIONAL[path])))
    assert reply.status_code == 200, reply.text
    plain, request = double.requests
    assert request == plain


async def test_null_within_an_object_is_as_good_as_not_given() -> None:
    double = Scripted()
    body = {"prompt": "a", "stream": True, "stream_options": {"include_usage": None, "include_obfuscation": None}}
    async with http_client(double) as http:
        reply = await http.post("/v1/completions", json=body)
    assert reply.text.endswith("data: [DONE]\n\n")
    assert '"usage"' not in reply.text


async def test_best_of_may_be_as_many_as_n() -> None:
    double = Scripted()
    async with openai_client(double) as client:
        await client.completions.create(model=MODEL, prompt="Say", n=3, best_of=3)
        with pytest.raises(openai.BadRequestError, match="make it the same as n"):
            await client.completions.create(model=MODEL, prompt="Say", n=2, best_of=3)
    assert [request.n for request in double.requests] == [3]


@pytest.mark.parametrize(
    ("seed", "taken"),
    [(0, 0), (-1, 2**64 - 1), (-(2**63), 2**63), (-5, 2**64 - 5), (2**63 - 1, 2**63 - 1), (2**64 - 1, 2**64 - 1)],
)
async def test_a_negative_seed_is_its_twos_complement(seed: int, taken: int) -> None:
    double = Scripted()
    async with openai_client(double) as client:
        await client.completions.create(model=MODEL, prompt="Say", seed=seed)
        await client.chat.completions.create(model=MODEL, messages=HI, seed=seed)
    assert [request.seed for request in double.requests] == [taken, taken]
    assert all(request.HasField("seed") for request in double.requests)


async def test_names_of_participants_go_no_further() -> None:
    double = Scripted()
    messages: Any = [
        {"role": "system", "content": "Be brief.", "name": "boss"},
        {"role": "user", "content": "hi", "name": "Bob"},
    ]
    async with openai_client(double) as client:
        await client.chat.completions.create(model=MODEL, messages=messages)
    (request,) = double.requests
    assert [(message.role, message.content) for message in request.chat.messages] == [
        ("system", "Be brief."),
        ("user", "hi"),
    ]


@pytest.mark.parametrize(
    "extra",
    [
        {"annotations": [], "tool_calls": []},
        {"annotations": None, "tool_calls": None, "refusal": None, "audio": None, "function_call": None},
        {"refusal": "", "name": "me"},
    ],
    ids=str,
)
async def test_an_answer_comes_back_with_what_it_has_empty(extra: dict[str, Any]) -> None:
    double = Scripted()
    messages: Any = [*HI, {"role": "assistant", "content": "Hello!"} | extra, {"role": "user", "content": ""}]
    async with openai_client(double) as client:
        await client.chat.completions.create(model=MODEL, messages=messages)
    (request,) = double.requests
    assert [message.content for message in request.chat.messages] == ["hi", "Hello!", ""]


@pytest.mark.parametrize(
    ("extra", "hint"),
    [
        ({"presence_penalty": 0.5}, "give repetition_penalty"),
        ({"frequency_penalty": -0.5}, "give repetition_penalty"),
        ({"logit_bias": {"5": 1}}, "leave it out"),
        ({"extra_body": {"min_tokens": 3}}, "set ignore_eos"),
        ({"echo": True}, "put the prompt before the text yourself"),
        ({"suffix": "end"}, "leave it out"),
    ],
    ids=str,
)
async def test_what_would_change_the_answer_is_refused_with_what_to_do(extra: dict[str, Any], hint: str) -> None:
    double = Scripted()
    (name,) = extra.get("extra_body", extra)
    async with openai_client(double) as client:
        with pytest.raises(openai.BadRequestError, match=f"{name} is not supported; .*{hint}") as caught:
            await client.completions.create(model=MODEL, prompt="Say", **extra)
    assert caught.value.param == name
    assert not double.requests


async def test_a_message_without_content_is_told_so() -> None:
    messages: Any = [*HI, {"role": "assistant", "content": None, "tool_calls": []}]
    async with openai_client(Scripted()) as client:
        with pytest.raises(openai.BadRequestError, match=r"messages\[1\].content is missing; give a text") as caught:
            await client.chat.completions.create(model=MODEL, messages=messages)
    assert caught.value.param == "messages[1].content"


@pytest.mark.parametrize("prompt", ["", [], ["a", ""]], ids=str)
async def test_an_empty_prompt_is_called_that(prompt: Any) -> None:
    double = Scripted(lambda: check_prompt(double.requests[-1].text), pb.GenerateResponse())
    async with openai_client(double) as client:
        with pytest.raises(openai.BadRequestError, match="the prompt is empty") as caught:
            await client.completions.create(model=MODEL, prompt=prompt)
    assert caught.value.param == "prompt"
