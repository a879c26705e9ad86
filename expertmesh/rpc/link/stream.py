"""Links between hosts: frames over a stream of gRPC's, either end of it."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from typing import Any

import grpc.aio

from expertmesh.rpc.link.frames import OnEnd, OnFrame, checksum

_HEAD_BYTES = 512  # about what a frame takes that has no message


class StreamConnection:
    """One end of a stream.

    Args:
        stream: A call, or the context of one; it is read and written from here only.
        on_frame: Is given every frame.
        on_end: Is told once that the stream has ended.
        most_unsent_bytes: It does not read on while the other side leaves more than this unread; None: it does. One
            end may hold back; two would wait for each other.

    Attributes:
        is_damaged: Whether something came that was not sent like that.
        has_more: Whether frames may have come behind the one that was handed on last, of which gRPC tells nothing.
    """

    has_more = True

    def __init__(self, stream: Any, on_frame: OnFrame, on_end: OnEnd, most_unsent_bytes: int | None = None) -> None:
        self._stream, self._on_frame, self._on_end = stream, on_frame, on_end
        self._outgoing: deque[Any] = deque()
        self._most_unsent_bytes, self._unsent_bytes = most_unsent_bytes, 0
        self._wake, self._sent = asyncio.Event(), asyncio.Event()
        self._closing = False
        self.is_damaged = False

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
        head.checksum = checksum(head.SerializeToString(deterministic=True), message)
        head.message = message
        self._outgoing.append(head)
        self._unsent_bytes += _HEAD_BYTES + len(message)
        self._wake.set()

    def finish(self) -> None:
        """Ends the stream, which gRPC does in good order."""
        self.close()

    def close(self) -> None:
        """Ends the stream."""
        self._closing = True
        self._wake.set()

    def abort(self) -> None:
        """Ends the stream; whoever runs it is cancelled."""
        self.close()

    async def _read(self) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # it has ended; whoever waits is told by on_end
            while (head := await self._stream.read()) is not grpc.aio.EOF and head is not None:
                told, message = head.checksum, head.message
                head.ClearField("checksum")
                head.ClearField("message")
                if checksum(head.SerializeToString(deterministic=True), message) != told:
                    self.is_damaged = True
                    return
                self._on_frame(head, message)
                while self._most_unsent_bytes is not None and self._unsent_bytes > self._most_unsent_bytes:
                    self._sent.clear()
                    await self._sent.wait()

    async def _write(self) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            while self._outgoing or not self._closing:
                while self._outgoing:
                    head = self._outgoing.popleft()
                    await self._stream.write(head)
                    self._unsent_bytes -= _HEAD_BYTES + len(head.message)
                    self._sent.set()
                self._wake.clear()
                if not self._closing:
                    await self._wake.wait()
