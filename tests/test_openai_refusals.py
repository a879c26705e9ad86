from __future__ import annotations

import json
import time
from typing import Any

import pytest

from services.gateway.web.openai import MAX_BODY_BYTES
from tests.doubles.scripted import Scripted
from tests.openai_gateway import http_client

BAD_NUMBERS: list[Any] = [True, "1", [], {}, -1, 2**31, 2**64, 10**400, 1e999, 1e30]
COMPLETIONS: list[tuple[Any, str]] = [
    *[({"prompt": "a", "max_tokens": value}, "max_tokens") for value in (*BAD_NUMBERS, 0, 1.5)],
    *[({"prompt": "a", "n": value}, "n") for value in (*BAD_NUMBERS, 0, 17, 10**6)],
    *[({"prompt": "a", "logprobs": value}, "logprobs") for value in (*BAD_NUMBERS, 6)],
    *[({"prompt": "a", "top_k": value}, "top_k") for value in BAD_NUMBERS],
    *[({"prompt": "a", "temperature": value}, "temperature") for value in (*BAD_NUMBERS, 100.5)],
    *[({"prompt": "a", "top_p": value}, "top_p") for value in (*BAD_NUMBERS, 0, 2)],
    *[({"prompt": "a", "min_p": value}, "min_p") for value in (*BAD_NUMBERS, 1.1)],
    *[({"prompt": "a", "repetition_penalty": value}, "repetition_penalty") for value in (*BAD_NUMBERS, 0)],
    *[({"prompt": "a", "timeout_s": value}, "timeout_s") for value in (*BAD_NUMBERS, 0, 3601)],
    *[({"prompt": "a", "seed": value}, "seed") for value in (True, "1", -(2**63) - 1, 2**64, -1.0, 1.0)],
    *[({"prompt": "a", "stream": value}, "stream") for value in (1, 0, "true")],
    *[({"prompt": "a", "ignore_eos": value}, "ignore_eos") for value in (1, "no")],
    *[({"prompt": value}, "prompt") for value in (3, {}, [], True, [1, -1], [1, True], [1, 2**31], [1] * 65, None)],
    *[({"prompt": value}, "prompt[1]") for value in (["a", 3], ["a", None], ["a", []], [[1], [2.5]], [[1], [2] * 65])],
    ({"prompt": ["a"] * 65}, "prompt"),
    ({"prompt": [1] * 1_000_000}, "prompt"),
    ({"prompt": "\ud800"}, "prompt"),
    ({"prompt": ["a", "\udfff"]}, "prompt[1]"),
    ({}, "prompt"),
    ({"prompt": "a", "stop": 3}, "stop"),
    ({"prompt": "a", "stop": ["a", 3]}, "stop[1]"),
    ({"prompt": "a", "stop": ["x"] * 1_000_000}, "stop"),
    ({"prompt": "a", "stop_token_ids": [1.5]}, "stop_token_ids"),
    ({"prompt": "a", "stop_token_ids": 3}, "stop_token_ids"),
    ({"prompt": "a", "stop_token_ids": [1] * 65}, "stop_token_ids"),
    ({"prompt": "a", "best_of": 2}, "best_of"),
    ({"prompt": "a", "echo": True}, "echo"),
    ({"prompt": "a", "suffix": "b"}, "suffix"),
    ({"prompt": "a", "presence_penalty": 0.5}, "presence_penalty"),
    ({"prompt": "a", "frequency_penalty": False}, "frequency_penalty"),
    ({"prompt": "a", "logit_bias": {"5": 1}}, "logit_bias"),
    ({"prompt": "a", "min_tokens": 2}, "min_tokens"),
    ({"prompt": "a", "contract": "none"}, "contract"),
    ({"prompt": "a", "contract": ["exact"]}, "contract"),
    ({"prompt": "a", "route": "degraded"}, "route"),
    ({"prompt": "a", "stream_options": {"include_usage": True}}, "stream_options"),
    ({"prompt": "a", "stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"prompt": "a", "stream": True, "stream_options": {"more": 1}}, "stream_options.more"),
    ({"prompt": "a", "stream": True, "stream_options": 1}, "stream_options"),
    ({"prompt": "a", "surprise": 1}, "surprise"),
    ({"prompt": "a", "\ud800": 1}, "\\ud800"),
    ({"prompt": "a", "model": 3}, "model"),
]
HI = [{"role": "user", "content": "hi"}]
CHATS: list[tuple[Any, str]] = [
    ({}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": HI * 1025}, "messages"),
    ({"messages": [*HI, "hi"]}, "messages[1]"),
    ({"messages": [{"content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": 3, "content": "hi"}]}, "messages[0].role"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": "hi", "name": 3}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": []}]}, "messages[0].content"),
    ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "assistant", "content": "a", "function_call": {}}]}, "messages[0].function_call"),
    ({"messages": [{"role": "assistant", "content": "a", "annotations": [{}]}]}, "messages[0].annotations"),
    ({"messages": [{"role": "assistant", "content": "a", "audio": {"id": "1"}}]}, "messages[0].audio"),
    ({"messages": [{"role": "assistant", "content": "a", "refusal": "no"}]}, "messages[0].refusal"),
    ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "1"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "user", "content": [3]}]}, "messages[0].content[0]"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
    ({"messages": HI, "max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
    ({"messages": HI, "max_completion_tokens": 0}, "max_completion_tokens"),
    ({"messages": HI, "logprobs": 1}, "logprobs"),
    ({"messages": HI, "top_logprobs": 1}, "top_logprobs"),
    ({"messages": HI, "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"messages": HI, "tools": [{"type": "function"}]}, "tools"),
    ({"messages": HI, "functions": [{}]}, "functions"),
    ({"messages": HI, "tool_choice": "required"}, "tool_choice"),
    ({"messages": HI, "parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"messages": HI, "store": "yes"}, "store"),
    ({"messages": HI, "presence_penalty": -1}, "presence_penalty"),
    ({"messages": HI, "frequency_penalty": 0.5}, "frequency_penalty"),
    ({"messages": HI, "logit_bias": {"5": 1}}, "logit_bias"),
    ({"messages": HI, "min_tokens": 1}, "min_tokens"),
    ({"messages": HI, "response_format": {"type": "json_object"}}, "response_format"),
    ({"messages": HI, "modalities": ["audio"]}, "modalities"),
    ({"messages": HI, "prompt": "a"}, "prompt"),
    ({"messages": HI, "temperature": "hot"}, "temperature"),
]


@pytest.mark.parametrize(("path", "table"), [("/v1/completions", COMPLETIONS), ("/v1/chat/completions", CHATS)])
async def test_bad_fields_are_refused_by_name(path: str, table: list[tuple[Any, str]]) -> None:
    double = Scripted()
    async with http_client(double) as http:
        for body, param in table:
            started_s = time.monotonic()
            reply = await http.post(path, content=json.dumps(body))
            shown = json.dumps(body)[:100]
            assert reply.status_code == 400, shown
            error = reply.json()["error"]
            if "Infinity" in shown:  # no JSON, so nothing has a name yet
                assert error["param"] is None
            else:
                assert error["param"] == param, shown
                assert param in error["message"]
            assert (error["type"], error["code"]) == ("invalid_request_error", None)
            assert len(reply.content) < 600
            assert time.monotonic() - started_s < 5
    assert not double.requests


async def test_numbers_too_large_for_a_float_are_named() -> None:
    async with http_client(Scripted()) as http:
        for value in ("1e999", "-1e999", "1" + "0" * 4000):
            reply = await http.post("/v1/completions", content=f'{{"prompt": "a", "temperature": {value}}}')
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "temperature")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"[]",
        b'"text"',
        b'{"prompt": "\xff"}',
        b'{"prompt": "a", "temperature": NaN}',
        b'{"prompt": "a", "temperature": -Infinity}',
        b'{"prompt": "a", "seed": 1' + b"0" * 5000 + b"}",
        b"[" * 5000,
        b'{"prompt":' * 5000,
        b'{"prompt": [' + b"[]," * 2**20 + b"[]]}",
        b'{"prompt": [' + b"1," * 2**21 + b"1]}",
        b'{"prompt": "' + b"x" * MAX_BODY_BYTES + b'"}',
    ],
    ids=lambda body: body[:24].decode(errors="replace"),
)
async def test_bodies_that_are_no_request(body: bytes) -> None:
    double = Scripted()
    async with http_client(double) as http:
        reply = await http.post("/v1/completions", content=body)
    assert reply.status_code == 400
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert not double.requests


async def test_the_largest_body_is_read() -> None:
    double = Scripted()
    room = MAX_BODY_BYTES - len(b'{"prompt": ""}')
    async with http_client(double) as http:
        reply = await http.post("/v1/completions", content=b'{"prompt": "' + b"x" * room + b'"}')
    assert reply.status_code == 200
    assert len(double.requests[0].text) == room


async def test_logprobs_are_refused_where_nobody_gives_texts() -> None:
    double = Scripted()
    async with http_client(double, token_texts=None) as http:
        reply = await http.post("/v1/completions", json={"prompt": "a", "logprobs": 1, "stream": True})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "logprobs")
    assert not double.requests


async def test_routes_that_are_not_there_answer_in_their_own_shape() -> None:
    async with http_client(Scripted()) as http:
        missing, wrong = await http.post("/v1/embeddings"), await http.get("/v1/completions")
        plain = await http.get("/nothing")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "invalid_request_error")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (405, "invalid_request_error")
    assert (plain.status_code, plain.text) == (404, "Not Found")
