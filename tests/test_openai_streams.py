from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from expertmesh.v1 import inference_pb2 as pb
from tests.doubles.scripted import Scripted, said
from tests.openai_gateway import counted, http_client, post, reset, serving, until

STOP = pb.FINISH_REASON_STOP


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
    before = counted("499")
    async with serving(double) as url:
        connection = await post(url, {"prompt": prompt, "stream": True})
        await asyncio.wait_for(double.started.wait(), 10)
        if begun:
            assert b"data: " in await asyncio.get_running_loop().sock_recv(connection, 4096)
        reset(connection)
        await until(lambda: double.closed.is_set() and double.open == 0)
        await until(lambda: counted("499") == before + 1)


async def test_a_caller_that_leaves_while_a_whole_answer_is_made_frees_it() -> None:
    double = Scripted(asyncio.Event())
    async with serving(double) as url:
        connection = await post(url, {"prompt": ["a", "b"]})
        await asyncio.wait_for(double.started.wait(), 10)
        reset(connection)
        await until(lambda: double.closed.is_set() and double.open == 0)


async def test_a_caller_that_does_not_read_holds_up_its_stream_and_nobody_else() -> None:
    count = 4000
    double = Scripted(*[said("x" * 10_000, ids=[1])] * count, said(finish=STOP))
    async with serving(double) as url, httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as http:
        connection = await post(url, {"prompt": "a", "stream": True})
        await asyncio.wait_for(double.started.wait(), 10)
        sent = -1
        while sent != double.sent:  # until it stands still
            sent = double.sent
            await asyncio.sleep(0.2)
        assert 0 < sent < count
        assert (await http.get("/healthz")).status_code == 200
        reset(connection)
        await until(lambda: double.open == 0)
        assert double.sent < count


async def test_a_stop_of_the_server_ends_what_is_under_way() -> None:
    double = Scripted(said("a", ids=[1]), asyncio.Event())
    async with serving(double) as url:
        stream, whole = await post(url, {"prompt": "a", "stream": True}), await post(url, {"prompt": "b"})
        await until(lambda: double.open == 2)
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
