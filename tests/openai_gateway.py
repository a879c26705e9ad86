"""The gateway's HTTP side in front of a scripted servicer, and clients of it."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
from prometheus_client import REGISTRY

from services.gateway.web.application import application, serve
from tests.doubles.scripted import Scripted

MODEL = "tinytext"
CONTEXT = 64
PIECES = {1: "Hel", 2: "l", 3: "o", 4: "!", 5: "?"}


async def token_texts(ids: list[int]) -> list[str]:
    """The texts of ids, of those that have one."""
    return [PIECES.get(one, "\ufffd") for one in ids]


@asynccontextmanager
async def serving(double: Scripted, **options: Any) -> AsyncIterator[str]:
    """The URL of an application; the options are its arguments."""
    given = {"model_name": MODEL, "created_s": 1_700_000_000, "context": CONTEXT, "token_texts": token_texts} | options
    async with serve(application(double, lambda: True, **given), "127.0.0.1:0") as address:  # type: ignore[arg-type]
        yield f"http://{address}"


@asynccontextmanager
async def openai_client(double: Scripted, **options: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's own client of it."""
    async with (
        serving(double, **options) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        yield client


@asynccontextmanager
async def http_client(double: Scripted, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client that sends any request."""
    async with serving(double, **options) as url, httpx.AsyncClient(base_url=url, timeout=20, trust_env=False) as http:
        yield http


async def events(response: httpx.Response) -> list[Any]:
    """The objects of a stream; its end as the text that it is."""
    text = (await response.aread()).decode()
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    return [line if line == "data: [DONE]" else json.loads(line.removeprefix("data: ")) for line in lines]


def counted(code: str) -> float:
    """How many completions were answered with a status so far."""
    return REGISTRY.get_sample_value("expertmesh_requests_total", {"method": "/v1/completions", "code": code}) or 0.0


async def post(url: str, body: Any) -> socket.socket:
    """A connection on which a completion has been asked for."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)))
    connection.setblocking(False)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
    await asyncio.get_running_loop().sock_sendall(connection, head.encode() + data)
    return connection


def reset(connection: socket.socket) -> None:
    """Ends a connection as a killed program does."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


async def until(is_so: Any) -> None:
    """Waits for something that is about to be so."""
    async with asyncio.timeout(10):
        while not is_so():
            await asyncio.sleep(0.01)
