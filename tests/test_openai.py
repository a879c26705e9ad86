from __future__ import annotations

import asyncio
import json
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from prometheus_client import REGISTRY

from expertmesh.errors import DeadlineExceeded, InvalidInput, MeshError, Overloaded, Unavailable, WrongPart
from expertmesh.v1 import inference_pb2 as pb
from services.gateway.web.application import application, serve
from services.gateway.web.openai import MAX_BODY_BYTES
from tests.doubles.scripted import PROFILE, Scripted, said

MODEL = "tinytext"
CONTEXT = 64
PIECES = {1: "Hel", 2: "l", 3: "o", 4: "!", 5: "?"}
STOP, LENGTH = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH


async def token_texts(ids: list[int]) -> list[str]:
    return [PIECES.get(one, "\ufffd") for one in ids]


@asynccontextmanager
async def serving(double: Scripted, **options: Any) -> AsyncIterator[str]:
    given = {"model_name": MODEL, "created_s": 1_700_000_000, "context": CONTEXT, "token_texts": token_texts} | options
    async with serve(application(double, lambda: True, **given), "127.0.0.1:0") as address:  # type: ignore[arg-type]
        yield f"http://{address}"


@asynccontextmanager
async def openai_client(double: Scripted, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        serving(double, **options) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        yield client


@asynccontextmanager
async def http_client(double: Scripted, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(double, **options) as url, httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as http:
        yield http


async def events(response: httpx.Response) -> list[Any]:
    """The objects of a stream; its end as the text that it is."""
    text = (await response.aread()).decode()
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line.removeprefix("data: ")) for line in lines]


# With OpenAI's own client


async def test_a_completion_tells_everything() -> None:
    double = Scripted()
    async with openai_client(double) as client:
        reply = await client.completions.create(model=MODEL, prompt="Say", max_tokens=4, temperature=0, seed=7)
    assert reply.id.startswith("cmpl-")
    assert (reply.object, reply.model, reply.system_fingerprint) == ("text_completion", MODEL, PROFILE.split()[-1])
    (choice,) = reply.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, "Hello!", "stop", None)
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (5, 4, 9)
    assert reply.model_extra is not None
    assert reply.model_extra["expertmesh"] == {"route": "mesh", "exact": True, "profile": PROFILE, "seed": 7}
    assert abs(reply.created - time.time()) < 60


async def test_what_is_asked_arrives_as_the_contract_has_it() -> None:
    double = Scripted()
    async with openai_client(double) as client:
        await client.completions.create(
            model=MODEL,
            prompt="Say",
            max_tokens=3,
            temperature=0.5,
            top_p=0.25,
            n=1,
            best_of=1,
            stop=["\n", "END"],
            seed=2**64 - 1,
            logprobs=2,
            user="me",
            extra_body={
                "top_k": 5,
                "min_p": 0.125,
                "repetition_penalty": 1.5,
                "stop_token_ids": [3, 4],
                "ignore_eos": True,
                "contract": "mesh-only",
                "route": "mesh",
                "timeout_s": 12,
            },
        )
    (request,) = double.requests
    assert request == pb.GenerateRequest(
        text="Say",
        max_tokens=3,
        temperature=0.5,
        top_p=0.25,
        top_k=5,
        min_p=0.125,
        repetition_penalty=1.5,
        n=1,
        stop=["\n", "END"],
        stop_ids=[3, 4],
        ignore_end=True,
        seed=2**64 - 1,
        logprobs=2,
        contract=pb.CONTRACT_MESH_ONLY,
        route=pb.ROUTE_MESH,
    )
    assert 10 < double.timeouts_s[0] <= 12


async def test_defaults_are_openais() -> None:
    double = Scripted()
    async with openai_client(double) as client:
        await client.completions.create(model=MODEL, prompt="Say")
        await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Say"}])
    text, chat = double.requests
    assert text.max_tokens == 16
    assert not chat.HasField("max_tokens")
    for request in (text, chat):
        assert not request.HasField("temperature")
        assert not request.HasField("seed")
        assert not request.HasField("logprobs")
        assert (request.n, request.contract, request.route) == (1, pb.CONTRACT_EXACT, pb.ROUTE_MESH)


async def test_a_stream_of_a_completion() -> None:
    async with openai_client(Scripted()) as client:
        stream = await client.completions.create(
            model=MODEL, prompt="Say", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    *pieces, last = chunks
    assert [piece.choices[0].text for piece in pieces] == ["Hel", "lo", "!"]
    assert [piece.choices[0].finish_reason for piece in pieces] == [None, None, "stop"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.system_fingerprint for chunk in chunks} == {PROFILE.split()[-1]}
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 9
    assert all(piece.usage is None for piece in pieces)
    assert pieces[-1].model_extra is not None
    assert pieces[-1].model_extra["expertmesh"]["exact"] is True
    assert "expertmesh" not in (pieces[0].model_extra or {})


async def test_a_chat_completion_and_its_stream() -> None:
    double = Scripted()
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello"}]},
    ]
    async with openai_client(double) as client:
        reply = await client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=9)
        stream = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=9, stream=True)
        chunks = [chunk async for chunk in stream]
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert (reply.choices[0].message.role, reply.choices[0].message.content) == ("assistant", "Hello!")
    assert reply.choices[0].finish_reason == "stop"
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello!"
    assert chunks[-1].choices[0].finish_reason == "stop"
    for request in double.requests:
        assert request.max_tokens == 9
        assert [(message.role, message.content) for message in request.chat.messages] == [
            ("system", "Be brief."),
            ("user", "Say hello"),
        ]


async def test_a_reply_can_be_sent_back_as_a_message() -> None:
    double = Scripted()
    async with openai_client(double) as client:
        reply = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Say"}])
        answer: Any = reply.choices[0].message
        again: Any = [{"role": "user", "content": "Say"}, answer.model_dump(), {"role": "user", "content": "More"}]
        await client.chat.completions.create(model=MODEL, messages=again)
        await client.chat.completions.create(model=MODEL, messages=[again[0], answer, again[2]])
    for request in double.requests[1:]:
        assert [message.content for message in request.chat.messages] == ["Say", "Hello!", "More"]


async def test_two_choices_keep_their_numbers() -> None:
    double = Scripted(
        said("a", choice=0, ids=[1]),
        said("x", choice=1, ids=[2]),
        said("y", choice=1, ids=[3], finish=STOP, exact=False, route=pb.ROUTE_FULL_MODEL),
        said("b", choice=0, ids=[4], finish=LENGTH),
        said(usage=pb.Usage(prompt_tokens=1, completion_tokens=4)),
    )
    async with openai_client(double) as client:
        stream = await client.completions.create(model=MODEL, prompt="Say", n=2, stream=True)
        chunks = [chunk async for chunk in stream]
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "ab", 1: "xy"}
    ends = {chunk.choices[0].index: chunk for chunk in chunks if chunk.choices[0].finish_reason}
    assert {index: end.choices[0].finish_reason for index, end in ends.items()} == {0: "length", 1: "stop"}
    told = {index: (end.model_extra or {})["expertmesh"] for index, end in ends.items()}
    assert (told[0]["route"], told[0]["exact"]) == ("mesh", True)
    assert (told[1]["route"], told[1]["exact"]) == ("full-model", False)


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_of_several_prompts_are_numbered_through(stream: bool) -> None:
    double = Scripted(
        said("a", choice=0, ids=[1], finish=STOP),
        said("b", choice=1, ids=[2], finish=STOP, usage=pb.Usage(prompt_tokens=3, completion_tokens=2)),
    )
    body = {"prompt": ["one", [4, 5], "three"], "n": 2, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    async with http_client(double) as http:
        reply = await http.post("/v1/completions", json=body)
    assert [request.WhichOneof("prompt") for request in double.requests] == ["text", "ids", "text"]
    assert list(double.requests[1].ids.ids) == [4, 5]
    assert len({request.seed for request in double.requests}) == 1
    if stream:
        *pieces, last, done = await events(reply)
        assert done == "data: [DONE]"
        choices = [piece["choices"][0] for piece in pieces]
    else:
        last = reply.json()
        choices = last["choices"]
        assert [choice["index"] for choice in choices] == list(range(6))
    assert {choice["index"]: choice["text"] for choice in choices} == dict(enumerate("ababab"))
    assert last["usage"] == {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}


async def test_logprobs_of_a_completion() -> None:
    async with openai_client(Scripted()) as client:
        reply = await client.completions.create(model=MODEL, prompt="Say", logprobs=2)
        stream = await client.completions.create(model=MODEL, prompt="Say", logprobs=2, stream=True)
        told = [chunk.choices[0].logprobs async for chunk in stream]
        without = await client.completions.create(model=MODEL, prompt="Say", logprobs=0)
    whole = reply.choices[0].logprobs
    assert whole is not None
    assert whole.tokens == ["Hel", "l", "o", "!"]
    assert whole.token_logprobs == pytest.approx([-0.1, -0.2, -0.3, -0.4])
    assert whole.text_offset == [0, 3, 4, 5]
    assert whole.top_logprobs is not None
    assert whole.top_logprobs[0] == pytest.approx({"Hel": -0.1, "l": -1.1})
    assert [offset for piece in told for offset in piece.text_offset] == [0, 3, 4, 5]  # type: ignore[union-attr]
    assert [token for piece in told for token in piece.tokens] == whole.tokens  # type: ignore[union-attr]
    assert without.choices[0].logprobs is not None
    assert without.choices[0].logprobs.top_logprobs is None


async def test_logprobs_of_a_chat() -> None:
    infinite = said("Hel", ids=[1, 9], finish=STOP)
    infinite.tokens[0].logprob = float("-inf")
    async with openai_client(Scripted(infinite)) as client:
        messages: Any = [{"role": "user", "content": "Say"}]
        reply = await client.chat.completions.create(model=MODEL, messages=messages, logprobs=True, top_logprobs=1)
    assert reply.choices[0].logprobs is not None
    first, second = reply.choices[0].logprobs.content or ()
    assert (first.token, first.logprob, first.bytes) == ("Hel", -9999.0, [72, 101, 108])
    assert [top.token for top in first.top_logprobs] == ["Hel"]
    assert (second.token, second.bytes) == ("\ufffd", None)


async def test_models_are_listed_by_their_one_name() -> None:
    async with openai_client(Scripted()) as client:
        listed = [model async for model in client.models.list()]
        assert [(model.id, model.created, model.owned_by) for model in listed] == [(MODEL, 1_700_000_000, "expertmesh")]
        assert (await client.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError) as caught:
            await client.completions.create(model="other", prompt="Say")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    "name", ["other", "a/b", "../../etc/passwd", "%2e%2e%2fmodels", "%00", "x" * 10_000, "%ff", ".", "Tinytext"]
)
async def test_other_names_of_models_are_not_found(name: str) -> None:
    async with serving(Scripted()) as url:
        host, port = url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"GET /v1/models/{name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        status = await reader.readline()
        body = await reader.read()
        writer.close()
        await writer.wait_closed()
    assert b" 404 " in status
    assert json.loads(body.partition(b"\r\n\r\n")[2])["error"]["code"] == "model_not_found"
    assert len(body) < 1000


@pytest.mark.parametrize("name", ["other", "../x", "/etc/passwd", "\0", "x" * 10_000, "", MODEL + "\u200b"])
async def test_other_names_in_requests_are_not_found(name: str) -> None:
    double = Scripted()
    async with http_client(double) as http:
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            reply = await http.post(path, json={"model": name, "prompt": "a"})
            assert reply.status_code == 404
            assert reply.json()["error"]["code"] == "model_not_found"
            assert len(reply.content) < 1000
    assert not double.requests


async def test_no_name_is_the_one_model() -> None:
    async with http_client(Scripted()) as http:
        reply = await http.post("/v1/completions", json={"prompt": "Say"})
    assert reply.json()["model"] == MODEL


@pytest.mark.parametrize(
    ("body", "kind"), [({"prompt": "Say"}, "text"), ({"messages": [{"role": "user", "content": "Say"}]}, "chat")]
)
async def test_tokenize(body: dict[str, Any], kind: str) -> None:
    double = Scripted()
    async with http_client(double) as http:
        reply = await http.post("/tokenize", json=body)
    assert reply.json() == {"count": 3, "max_model_len": CONTEXT, "tokens": [1, 5, 9]}
    assert double.tokenized[0].WhichOneof("prompt") == kind


# What is refused

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
    *[({"prompt": "a", "seed": value}, "seed") for value in (True, "1", -1, 2**64, 1.0)],
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
    ({"messages": [{"role": "user", "content": "hi", "name": "Bob"}]}, "messages[0].name"),
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


@pytest.mark.parametrize(
    "extra",
    [
        {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}},
        {"suffix": None, "stop": None, "logprobs": None, "seed": None, "stream_options": None},
        {"user": "me", "best_of": 1, "echo": False, "stop": "x"},
    ],
)
async def test_neutral_values_are_taken(extra: dict[str, Any]) -> None:
    async with http_client(Scripted()) as http:
        assert (await http.post("/v1/completions", json={"prompt": "a"} | extra)).status_code == 200


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


# Errors of those who answer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "kind", "param", "code"),
    [
        (InvalidInput("too long", "ids[3]"), 400, "invalid_request_error", "prompt[3]", None),
        (InvalidInput("bad role", "chat.messages[2].role"), 400, "invalid_request_error", "messages[2].role", None),
        (InvalidInput("bad"), 400, "invalid_request_error", None, None),
        (WrongPart("this model classifies"), 400, "invalid_request_error", None, "unsupported_by_model"),
        (Overloaded("full", 2.5), 429, "rate_limit_error", None, "resource_exhausted"),
        (Unavailable("no gating", "gating"), 503, "server_error", None, "unavailable"),
        (DeadlineExceeded("late"), 504, "server_error", None, "deadline_exceeded"),
    ],
)
async def test_errors_before_the_first_byte_are_replies(
    stream: bool, error: MeshError, status: int, kind: str, param: str | None, code: str | None
) -> None:
    async with http_client(Scripted(error)) as http:
        reply = await http.post("/v1/completions", json={"prompt": "a", "stream": stream})
    assert reply.status_code == status
    assert reply.json()["error"] == {"message": str(error), "type": kind, "param": param, "code": code}
    assert reply.headers.get("Retry-After") == {429: "3", 503: "1"}.get(status)


@pytest.mark.parametrize("stream", [False, True])
async def test_what_nobody_expected_is_not_shown(stream: bool) -> None:
    def break_down() -> None:
        raise KeyError("/secret/path")

    for double in (Scripted(break_down), Scripted(said("a", ids=[1]), break_down)):
        async with http_client(double) as http:
            reply = await http.post("/v1/completions", json={"prompt": "a", "stream": stream})
        assert "internal error" in reply.text
        assert "secret" not in reply.text
        assert double.open == 0


async def test_an_error_in_the_middle_ends_the_stream() -> None:
    double = Scripted(said("a", ids=[1]), Unavailable("no gating", "gating"))
    before = _counted("503")
    async with http_client(double) as http:
        reply = await http.post("/v1/completions", json={"prompt": "a", "stream": True})
        first, last = await events(reply)
    assert reply.status_code == 200
    assert first["choices"][0]["text"] == "a"
    assert last == {"error": {"message": "no gating", "type": "server_error", "param": None, "code": "unavailable"}}
    assert double.open == 0
    assert _counted("503") == before + 1


async def test_openais_client_raises_an_error_in_the_middle() -> None:
    async with openai_client(Scripted(said("a", ids=[1]), Overloaded("no room"))) as client:
        stream = await client.completions.create(model=MODEL, prompt="Say", stream=True)
        with pytest.raises(openai.APIError, match="no room"):
            [chunk async for chunk in stream]


async def test_a_stream_that_ends_unfinished_is_no_whole_answer() -> None:
    async with http_client(Scripted(said("a", ids=[1]))) as http:
        last = (await events(await http.post("/v1/completions", json={"prompt": "a", "stream": True})))[-1]
    assert last["error"]["code"] == "data_loss"


async def test_one_failed_prompt_ends_the_others() -> None:
    double = Scripted()
    forever = asyncio.Event()

    def fail_second() -> None:
        if len(double.requests) == 2:
            raise InvalidInput("no", "text")

    double.steps = (fail_second, forever)
    for stream in (False, True):
        double.requests.clear()
        async with http_client(double) as http:
            reply = await http.post("/v1/completions", json={"prompt": ["a", "b", "c"], "stream": stream})
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")
        assert double.open == 0


# Streams


async def test_pieces_are_sent_as_they_come() -> None:
    gate = asyncio.Event()
    double = Scripted(said("a", ids=[1]), gate, said("b", ids=[2], finish=STOP))
    async with (
        http_client(double) as http,
        http.stream("POST", "/v1/completions", json={"prompt": "a", "stream": True}) as reply,
    ):
        assert reply.headers["Content-Type"].startswith("text/event-stream")
        assert "Content-Length" not in reply.headers
        lines = reply.aiter_lines()
        first = json.loads((await anext(lines)).removeprefix("data: "))
        assert first["choices"][0]["text"] == "a"
        assert not double.closed.is_set()
        gate.set()
        rest = [line async for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert double.open == 0


@pytest.mark.parametrize("prompt", ["a", ["a", "b", "c"]], ids=["one", "three"])
@pytest.mark.parametrize("begun", [True, False], ids=["in the middle", "before the first token"])
async def test_a_caller_that_leaves_a_stream_frees_it_at_once(begun: bool, prompt: Any) -> None:
    forever = asyncio.Event()
    double = Scripted(*([said("a", ids=[1])] if begun else []), forever)
    before = _counted("499")
    async with serving(double) as url:
        connection = await _post(url, {"prompt": prompt, "stream": True})
        await asyncio.wait_for(double.started.wait(), 10)
        if begun:
            assert b"data: " in await asyncio.get_running_loop().sock_recv(connection, 4096)
        _reset(connection)
        await _until(lambda: double.closed.is_set() and double.open == 0)
        await _until(lambda: _counted("499") == before + 1)


async def test_a_caller_that_leaves_while_a_whole_answer_is_made_frees_it() -> None:
    double = Scripted(asyncio.Event())
    async with serving(double) as url:
        connection = await _post(url, {"prompt": ["a", "b"]})
        await asyncio.wait_for(double.started.wait(), 10)
        _reset(connection)
        await _until(lambda: double.closed.is_set() and double.open == 0)


async def test_a_caller_that_does_not_read_holds_up_its_stream_and_nobody_else() -> None:
    count = 4000
    double = Scripted(*[said("x" * 10_000, ids=[1])] * count, said(finish=STOP))
    async with serving(double) as url, httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as http:
        connection = await _post(url, {"prompt": "a", "stream": True})
        await asyncio.wait_for(double.started.wait(), 10)
        sent = -1
        while sent != double.sent:  # until it stands still
            sent = double.sent
            await asyncio.sleep(0.2)
        assert 0 < sent < count
        assert (await http.get("/healthz")).status_code == 200
        _reset(connection)
        await _until(lambda: double.open == 0)
        assert double.sent < count


async def test_a_stop_of_the_server_ends_what_is_under_way() -> None:
    double = Scripted(said("a", ids=[1]), asyncio.Event())
    async with serving(double) as url:
        stream, whole = await _post(url, {"prompt": "a", "stream": True}), await _post(url, {"prompt": "b"})
        await _until(lambda: double.open == 2)
    assert double.open == 0
    loop = asyncio.get_running_loop()
    assert b"503 Service Unavailable" in await loop.sock_recv(whole, 4096)
    assert b"[DONE]" not in await loop.sock_recv(stream, 4096)
    stream.close()
    whole.close()


async def test_paths_in_metrics_are_few() -> None:
    async with http_client(Scripted()) as http:
        for name in ("one", "two"):
            await http.get(f"/v1/models/{name}")
        text = (await http.get("/metrics")).text
    assert 'method="/v1/models/{model:path}"' in text
    assert "/v1/models/one" not in text


def _counted(code: str) -> float:
    return REGISTRY.get_sample_value("expertmesh_requests_total", {"method": "/v1/completions", "code": code}) or 0.0


async def _post(url: str, body: Any) -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)))
    connection.setblocking(False)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    await asyncio.get_running_loop().sock_sendall(connection, head.encode() + data)
    return connection


def _reset(connection: socket.socket) -> None:
    """Ends a connection as a killed program does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


async def _until(is_so: Any) -> None:
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.01)
