"""Links between neighbours: frames over a unix socket.

A frame is two lengths, a checksum, the serialised `LinkRequest` or `LinkResponse` without its message, and the message.
So a message is neither copied into another one nor parsed twice.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from struct import Struct
from typing import Any, cast

from google.protobuf.message import DecodeError

from expertmesh.rpc.link.frames import Heads, OnEnd, OnFrame, checksum

MOST_HEAD_BYTES = 2**16
_PREFIX = Struct("<IIQ")
_FIRST_BUFFER_BYTES = 2**17
_SOCKET_BUFFER_BYTES = 2**20


class SocketConnection(asyncio.BufferedProtocol):
    """One end of a connection.

    Args:
        heads: What comes in front of messages from the other side.
        on_frame: Is given every frame; its message is gone when it returns.
        on_end: Is told once that the connection has ended.
        max_message_bytes: Largest message that is taken; whoever sends a larger one is cut off.
        on_open: Is told that frames can be sent.
        holds_back: Whether it does not read on while the other side leaves more than a largest message unread. One
            end may do so; two would wait for each other.

    Attributes:
        is_damaged: Whether something came that was not sent like that.
        has_more: Whether more has been read than the frame that was handed on last.
    """

    def __init__(
        self,
        heads: Heads,
        on_frame: OnFrame,
        on_end: OnEnd,
        max_message_bytes: int,
        on_open: Callable[[], None] = lambda: None,
        holds_back: bool = False,
    ) -> None:
        self._holds_back = holds_back
        self._on_open = on_open
        self._parse, self._on_frame, self._on_end = heads.FromString, on_frame, on_end
        self._most_bytes = max_message_bytes
        self._buffer = bytearray(_FIRST_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._filled = 0
        self._transport: asyncio.Transport | None = None
        self._finished = False
        self.is_damaged = self.has_more = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """As asyncio has it."""
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=self._most_bytes)
        own: socket.socket = transport.get_extra_info("socket")
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            own.setsockopt(socket.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
        self._on_open()

    def connection_lost(self, error: Exception | None) -> None:
        """As asyncio has it."""
        self._transport = None
        self._on_end()

    def pause_writing(self) -> None:
        """As asyncio has it."""
        if self._holds_back and self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        """As asyncio has it."""
        if self._holds_back and self._transport is not None:
            self._transport.resume_reading()

    def get_buffer(self, sizehint: int) -> memoryview:
        """Where the next bytes go."""
        return self._view[self._filled :]

    def buffer_updated(self, count: int) -> None:
        """Hands on the frames that are whole."""
        self._filled += count
        start = 0
        while self._filled - start >= _PREFIX.size:
            head_bytes, message_bytes, told = _PREFIX.unpack_from(self._buffer, start)
            if head_bytes > MOST_HEAD_BYTES or message_bytes > self._most_bytes:
                self._give_up()
                return
            head_at = start + _PREFIX.size
            message_at = head_at + head_bytes
            end = message_at + message_bytes
            if end > self._filled:
                self._make_room(start, end - start)
                return
            head_view, message = self._view[head_at:message_at], self._view[message_at:end]
            if checksum(head_view, message) != told:
                self._give_up()
                return
            try:
                head = self._parse(head_view)
            except DecodeError:
                self._give_up()
                return
            self.has_more = self._filled > end
            self._on_frame(head, message)
            start = end
        self._make_room(start, _PREFIX.size)

    def send(self, head: Any, message: bytes) -> None:
        """Sends a frame; one that nobody is there to receive is dropped."""
        if self._transport is not None and not self._finished:
            data: bytes = head.SerializeToString()
            prefix = _PREFIX.pack(len(data), len(message), checksum(data, message))
            self._transport.write(b"".join((prefix, data, message)))

    def finish(self) -> None:
        """Sends no more; were the socket closed, a peer that writes to it would lose what it has not read yet."""
        if self._transport is not None and not self._finished:
            self._finished = True
            self._transport.write_eof()

    def close(self) -> None:
        """Ends the connection, what has been sent being delivered first."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Ends the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def _give_up(self) -> None:
        """Ends the connection, since where the next frame begins is not certain any more."""
        self.is_damaged = True
        self.close()

    def _make_room(self, start: int, needed: int) -> None:
        """Moves what is left to the front of a buffer in which a frame of so many bytes fits."""
        left = self._filled - start
        if needed > len(self._buffer):
            buffer = bytearray(needed + _FIRST_BUFFER_BYTES)
            buffer[:left] = self._view[start : self._filled]
            self._buffer, self._view = buffer, memoryview(buffer)
        elif start and left:
            self._view[:left] = bytes(self._view[start : self._filled])
        self._filled = left


async def connect(
    path: str, heads: Heads, on_frame: OnFrame, on_end: OnEnd, max_message_bytes: int
) -> SocketConnection:
    """Connects to a neighbour.

    Raises:
        OSError: Nobody listens there.
    """
    _, connection = await asyncio.get_running_loop().create_unix_connection(
        lambda: SocketConnection(heads, on_frame, on_end, max_message_bytes), path
    )
    return connection


@asynccontextmanager
async def listening(path: str, accept: Callable[[], SocketConnection]) -> AsyncIterator[None]:
    """Takes connections at a path while the context is open; only this user may connect."""
    server = await asyncio.get_running_loop().create_unix_server(accept, path)
    os.chmod(path, 0o600)
    own = os.stat(path).st_ino
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            if os.stat(path).st_ino == own:  # a successor may have taken the path over meanwhile
                os.unlink(path)
        server.close()
