"""A proxy of our own between a gateway and a replica, which treats bytes badly when it is told to."""

from __future__ import annotations

import asyncio
import os
import random
import socket
import struct
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Self

from expertmesh.rpc.settings import LINK_SUFFIX

CHUNK_BYTES = 2**16
TO_REPLICA, TO_GATEWAY = "to replica", "to gateway"


@dataclass(frozen=True)
class Fault:
    """What happens to bytes; by itself, nothing.

    Attributes:
        directions: In which it happens.
        latency_s: By how long they are late.
        bytes_per_s: How many pass in a second; 0: as many as come.
        swallow: They are read and never passed on, and connections are taken and never answered.
        corrupt: Share of chunks of which one byte is changed.
        seed: Of what is changed.
    """

    directions: tuple[str, ...] = (TO_REPLICA, TO_GATEWAY)
    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    swallow: bool = False
    corrupt: float = 0.0
    seed: int = 0


HONEST = Fault()


class Proxy:
    """Listens at one address and passes everything on to another; of `unix:` ones the sockets of links, too.

    Args:
        listen: `unix:PATH` or `HOST:PORT`.
        to: Likewise; nobody need listen there yet.

    Attributes:
        corrupted: Chunks that were changed so far.
        swallowed_bytes: Bytes that were never passed on.
    """

    def __init__(self, listen: str, to: str) -> None:
        self.listen, self._to = listen, to
        self._fault = HONEST
        self._random = random.Random(0)
        self._changed = asyncio.Event()
        self._connections: set[_Connection] = set()
        self.corrupted = self.swallowed_bytes = 0

    @property
    def fault(self) -> Fault:
        """What happens to bytes now."""
        return self._fault

    @fault.setter
    def fault(self, fault: Fault) -> None:
        self._fault = fault
        self._random = random.Random(fault.seed)
        self._changed.set()
        self._changed = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._stack = AsyncExitStack()
        suffixes = ["", LINK_SUFFIX] if self.listen.startswith("unix:") else [""]
        for suffix in suffixes:
            await self._stack.enter_async_context(self._listening(suffix))
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        await self._end_all(_Connection.close)

    async def reset(self) -> None:
        """Ends every connection with a reset where the socket knows such a thing."""
        await self._end_all(_Connection.reset)

    async def half_close(self, direction: str) -> None:
        """Says on every connection that nothing more comes in one direction; the other goes on."""
        for connection in list(self._connections):
            connection.half_close(direction)

    async def _end_all(self, end: object) -> None:
        tasks = [connection.task for connection in self._connections]
        for connection in list(self._connections):
            end(connection)  # type: ignore[operator]
        await asyncio.gather(*tasks, return_exceptions=True)

    @asynccontextmanager
    async def _listening(self, suffix: str) -> AsyncIterator[None]:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            connection = _Connection(self, task, reader, writer)
            self._connections.add(connection)
            try:
                await connection.run(self._to + suffix)
            except (OSError, asyncio.CancelledError):
                pass
            finally:
                connection.close()
                self._connections.discard(connection)

        if self.listen.startswith("unix:"):
            path = self.listen.removeprefix("unix:") + suffix
            server = await asyncio.start_unix_server(accept, path)
            os.chmod(path, 0o600)
        else:
            host, _, port = self.listen.rpartition(":")
            server = await asyncio.start_server(accept, host, int(port))
            self.listen = f"{host}:{server.sockets[0].getsockname()[1]}"
        try:
            yield
        finally:
            server.close()
            if self.listen.startswith("unix:"):
                with suppress(FileNotFoundError):
                    os.unlink(path)

    async def treat(self, data: bytes, direction: str) -> bytes:
        """What is passed on of a chunk, when it is time to."""
        fault = self._fault
        if direction not in fault.directions:
            return data
        if fault.swallow:
            self.swallowed_bytes += len(data)
            return b""
        wait_s = fault.latency_s + (len(data) / fault.bytes_per_s if fault.bytes_per_s else 0.0)
        if wait_s:
            with suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._changed.wait()
        if fault.corrupt and self._random.random() < fault.corrupt:
            changed = bytearray(data)
            changed[self._random.randrange(len(changed))] ^= self._random.randrange(1, 256)
            self.corrupted += 1
            return bytes(changed)
        return data

    async def until_heard(self) -> None:
        """Waits as long as connections are not to be answered."""
        while self._fault.swallow:
            await self._changed.wait()


class _Connection:
    """One connection of a gateway, and the one to the replica that belongs to it."""

    def __init__(
        self, proxy: Proxy, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._proxy, self.task = proxy, task
        self._reader, self._writers = reader, {TO_GATEWAY: writer}

    async def run(self, to: str) -> None:
        await self._proxy.until_heard()
        reader, self._writers[TO_REPLICA] = await _connect(to)
        ways = [self._pass(self._reader, TO_REPLICA), self._pass(reader, TO_GATEWAY)]
        async with asyncio.TaskGroup() as group:
            for way in ways:
                group.create_task(way)

    async def _pass(self, reader: asyncio.StreamReader, direction: str) -> None:
        writer = self._writers[direction]
        try:
            while data := await reader.read(CHUNK_BYTES):
                if (treated := await self._proxy.treat(data, direction)) and not writer.transport.is_closing():
                    writer.write(treated)
                    await writer.drain()
            self.half_close(direction)
        except (OSError, RuntimeError):  # one way is broken: so is the other
            self.close()

    def half_close(self, direction: str) -> None:
        writer = self._writers.get(direction)
        if writer is not None and writer.can_write_eof() and not writer.transport.is_closing():
            with suppress(OSError):
                writer.write_eof()

    def reset(self) -> None:
        for writer in self._writers.values():
            own: socket.socket = writer.get_extra_info("socket")
            if own.family != socket.AF_UNIX:
                own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.transport.abort()


async def _connect(to: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if to.startswith("unix:"):
        return await asyncio.open_unix_connection(to.removeprefix("unix:"))
    host, _, port = to.rpartition(":")
    return await asyncio.open_connection(host, int(port))
