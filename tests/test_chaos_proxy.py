from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest

from expertmesh.rpc.settings import LINK_SUFFIX
from tests import tiny
from tests.chaos.proxy import HONEST, TO_GATEWAY, TO_REPLICA, Fault, Proxy

Opened = tuple[asyncio.StreamReader, asyncio.StreamWriter]


@dataclass
class Behind:
    """A proxy before something that says everything twice, and a way to connect to it."""

    proxy: Proxy
    connect: Callable[[], Awaitable[Opened]]
    ended: asyncio.Event


@asynccontextmanager
async def echo(kind: str, suffix: str = "") -> AsyncIterator[Behind]:
    ended = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(2**16):
                writer.write(data)
                await writer.drain()
            writer.write(b"the end")
        ended.set()
        writer.close()

    folder = tiny.scratch()
    if kind == "unix":
        server = await asyncio.start_unix_server(answer, f"{folder}/echo.sock{suffix}")
        proxy = Proxy(f"unix:{folder}/proxy.sock", f"unix:{folder}/echo.sock")
    else:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        proxy = Proxy("127.0.0.1:0", f"127.0.0.1:{server.sockets[0].getsockname()[1]}")

    async def connect() -> Opened:
        if kind == "unix":
            return await asyncio.open_unix_connection(proxy.listen.removeprefix("unix:") + suffix)
        host, _, port = proxy.listen.rpartition(":")
        return await asyncio.open_connection(host, int(port))

    async with server, proxy:
        yield Behind(proxy, connect, ended)


async def said(opened: Opened, data: bytes) -> bytes:
    opened[1].write(data)
    async with asyncio.timeout(10):
        return await opened[0].readexactly(len(data))


async def closed(opened: Opened) -> None:
    opened[1].close()
    with suppress(ConnectionError):
        await opened[1].wait_closed()


@pytest.mark.parametrize(("kind", "suffix"), [("tcp", ""), ("unix", ""), ("unix", LINK_SUFFIX)])
async def test_without_a_fault_every_byte_passes_and_both_ends_are_heard(kind: str, suffix: str) -> None:
    async with echo(kind, suffix) as behind:
        opened = await behind.connect()
        data = os.urandom(2**20)
        answered = asyncio.create_task(opened[0].readexactly(2**20))
        opened[1].write(data)
        assert await answered == data
        opened[1].write_eof()
        assert await opened[0].read() == b"the end"
        await closed(opened)


async def test_corrupted_bytes_are_those_that_the_seed_says_and_none_in_the_other_direction() -> None:
    async with echo("tcp") as behind:
        opened = await behind.connect()
        behind.proxy.fault = Fault((TO_GATEWAY,), corrupt=1.0, seed=4)
        data = bytes(100)
        first = await said(opened, data)
        assert sum(a != b for a, b in zip(first, data, strict=True)) == 1
        behind.proxy.fault = Fault((TO_GATEWAY,), corrupt=1.0, seed=4)
        assert await said(opened, data) == first
        behind.proxy.fault = HONEST
        assert await said(opened, data) == data
        assert behind.proxy.corrupted == 2
        await closed(opened)


async def test_a_black_hole_takes_connections_and_says_nothing_until_it_is_over() -> None:
    async with echo("tcp") as behind:
        before = await behind.connect()
        assert await said(before, b"hello") == b"hello"
        behind.proxy.fault = Fault(swallow=True)
        during = await behind.connect()
        before[1].write(b"lost")
        during[1].write(b"kept")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(before[0].read(1), 0.2)
        assert behind.proxy.swallowed_bytes == 4
        behind.proxy.fault = HONEST
        assert await during[0].readexactly(4) == b"kept"  # it was in the socket all the time
        assert await said(before, b"again") == b"again"
        await closed(before)
        await closed(during)


async def test_a_reset_ends_connections_and_the_next_one_is_taken() -> None:
    async with echo("tcp") as behind:
        opened = await behind.connect()
        await said(opened, b"hello")
        await behind.proxy.reset()
        with pytest.raises(ConnectionResetError):
            await opened[0].read(1)
        again = await behind.connect()
        assert await said(again, b"hello") == b"hello"
        await closed(opened)
        await closed(again)


async def test_a_half_closed_connection_goes_on_in_the_other_direction() -> None:
    async with echo("tcp") as behind:
        opened = await behind.connect()
        await said(opened, b"hello")
        await behind.proxy.half_close(TO_REPLICA)
        assert await opened[0].read() == b"the end"
        await asyncio.wait_for(behind.ended.wait(), 10)
        await closed(opened)


@pytest.mark.parametrize("fault", [Fault((TO_REPLICA,), latency_s=0.2), Fault((TO_GATEWAY,), bytes_per_s=500.0)])
async def test_bytes_are_late(fault: Fault) -> None:
    async with echo("tcp") as behind:
        opened = await behind.connect()
        clock = asyncio.get_running_loop().time
        await said(opened, bytes(100))
        behind.proxy.fault = fault
        started_s = clock()
        await said(opened, bytes(100))
        assert clock() - started_s >= 0.2
        await closed(opened)
