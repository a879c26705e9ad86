"""Links between hosts: frames over a stream of gRPC's, either end of it."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Any

import grpc.aio

from expertmesh.rpc.link.frames import OnEnd, OnFrame


class StreamConnection:
    """One end of a stream.

    Args:
        stream: A call, or the context of one; it is read and written from here only.
        on_frame: Is given every frame.
        on_end: Is told once that the stream has ended.
    """

    def __init__(self, stream: Any, on_frame: OnFrame, on_end: OnEnd) -> None:
        self._stream, self._on_frame, self._on_end = stream, on_frame, on_end
        self._outgoing: deque[Any] = deque()
        self._wake = asyncio.Event()
        self._closing = False

    async def run(self) -> None:
        """Carries frames until either side ends the stream; what has been sent before `close` is delivered."""
        reading, writing = asyncio.create_task(self._read()), asyncio.create_task(self._write())
        try:
            await asyncio.wait([reading, writing], return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (reading, writing):
                task.cancel()
            await asyncio.gather(reading, writing, return_exceptions=True)
            self._on_end()

    def send(self, head: Any, message: bytes) -> None:
        """Sends a frame; never waits."""
        head.message = message
        self._outgoing.append(head)
        self._wake.set()

    def close(self) -> None:
        """Ends the stream."""
        self._closing = True
        self._wake.set()

    async def _read(self) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it has ended; whoever waits is told by on_end
            while (head := await self._stream.read()) is not grpc.aio.EOF and head is not None:
                self._on_frame(head, head.message)

    async def _write(self) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while self._outgoing or not self._closing:
                while self._outgoing:
                    await self._stream.write(self._outgoing.popleft())
                self._wake.clear()
                if not self._closing:
                    await self._wake.wait()
