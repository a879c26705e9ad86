from __future__ import annotations

import asyncio
import json
from typing import Any

import openai
import pytest

from tests.doubles.scripted import Scripted
from tests.openai_gateway import CONTEXT, MODEL, http_client, openai_client, serving


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
