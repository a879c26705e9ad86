from __future__ import annotations

import asyncio

import openai
import pytest

from expertmesh.errors import DeadlineExceeded, InvalidInput, MeshError, Overloaded, Unavailable, WrongPart
from tests.doubles.scripted import Scripted, said
from tests.openai_gateway import MODEL, counted, events, http_client, openai_client


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
    before = counted("503")
    async with http_client(double) as http:
        reply = await http.post("/v1/completions", json={"prompt": "a", "stream": True})
        first, last = await events(reply)
    assert reply.status_code == 200
    assert first["choices"][0]["text"] == "a"
    assert last == {"error": {"message": "no gating", "type": "server_error", "param": None, "code": "unavailable"}}
    assert double.open == 0
    assert counted("503") == before + 1


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
