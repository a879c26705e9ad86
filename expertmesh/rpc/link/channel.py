"""The caller's side of a link, which stubs take in place of a gRPC channel.

It does not retry, balance or reconnect by itself; see `rpc.replicas.replica` for who does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from itertools import count
from time import monotonic
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from expertmesh.errors import CorruptReply, MeshError, Unavailable
from expertmesh.rpc import request_id
from expertmesh.rpc.alarms import Alarms
from expertmesh.rpc.errors import STATUSES, from_status
from expertmesh.rpc.link import socket
from expertmesh.rpc.link.frames import Connection, OnEnd
from expertmesh.rpc.link.reply import Reply
from expertmesh.rpc.link.stream import StreamConnection
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.settings import LINK_SUFFIX
from expertmesh.telemetry.tracing import OFF, Tracing
from expertmesh.v1.description_pb2 import DescribeResponse
from expertmesh.v1.link_pb2 import LinkRequest, LinkResponse
from expertmesh.v1.link_pb2_grpc import LinkServiceStub

FRAME_BYTES = 1024  # room for what a frame has beside its message
Parse = Callable[[Any], Any]
Call = Callable[[Any, float], Awaitable[Any]]
Trace = Mapping[str, str]


class LinkChannel:
    """A connection to one process, made anew by `open` whenever the last one has ended.

    Args:
        address: Of the process; a neighbour's is `unix:PATH`.
        channel: To the same.
        service: What it is called in errors.
        tracing: Carries trace context on every call.
        max_message_bytes: Largest message, in both directions.

    Attributes:
        origin: What process is at the other end.
        ended: Set while there is no connection.
        is_draining: Whether the process has said that it is about to stop.
        on_drain: Is told when it says so.
    """

    def __init__(
        self,
        address: str,
        channel: grpc.aio.Channel,
        service: str,
        tracing: Tracing = OFF,
        max_message_bytes: int = 64 * 2**20,
    ) -> None:
        self._address, self._channel, self._service = address, channel, service
        self._tracing = tracing
        self._max_message_bytes = max_message_bytes
        self._numbers = count(1)
        self._opened = 0
        self._pending: dict[int, Reply] = {}
        self._alarms = Alarms()
        self._connection: Connection | None = None
        self._stream: asyncio.Task[None] | None = None
        self._introduced: asyncio.Future[None] | None = None
        self.origin = Origin("", "")
        self.is_draining = False
        self.on_drain: Callable[[], None] = lambda: None
        self.ended = asyncio.Event()
        self.ended.set()

    @property
    def is_traced(self) -> bool:
        """Whether calls have spans of their own, in which they are made and waited for."""
        return self._tracing.is_on

    @property
    def calls_under_way(self) -> int:
        """Calls that wait for their replies."""
        return len(self._pending)

    async def open(self, timeout_s: float) -> None:
        """Connects and hears who is at the other end; a connection that has calls under way is kept.

        Raises:
            Unavailable: Nobody answers, or not in time.
        """
        if self._pending and not self.ended.is_set():
            return  # one call that failed is no reason to end the others
        await self.close()
        self._introduced = asyncio.get_running_loop().create_future()
        self._opened += 1
        on_end = partial(self._end, self._opened)
        try:
            async with asyncio.timeout(timeout_s):
                await (self._open_socket if self._address.startswith("unix:") else self._open_stream)(on_end)
                await self._introduced
        except (TimeoutError, OSError, MeshError) as error:
            await self.close()
            why = str(error) or type(error).__name__
            raise Unavailable(f"{self._service} offers links and takes none: {why}", self._service) from None
        if self._connection is None:  # it ended while its first word was read
            raise Unavailable(f"{self._service} does not answer", self._service)
        self.ended.clear()

    async def close(self) -> None:
        """Ends the connection; what is under way fails."""
        if self._connection is not None:
            self._connection.abort()  # a process that hangs never reads what is left
        if self._stream is not None:
            self._stream.cancel()
            await asyncio.gather(self._stream, return_exceptions=True)
        self._end(self._opened)

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Parse,
        _registered_method: bool = False,
    ) -> Call:
        """One method, as stubs ask a channel for it: called with a request and seconds, it gives what can be awaited.

        That is a `Reply`, which is under way, unless calls are traced.
        """

        def call(request: Any, timeout_s: float) -> Awaitable[Any]:
            send = self._send_traced if self._tracing.is_on else self._send
            return send(method, request_serializer(request), response_deserializer, timeout_s)

        return call

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        """A method with a stream of replies, which has a call of its own."""
        return self._channel.unary_stream(*args, **kwargs)

    def _send(self, method: str, message: bytes, parse: Parse, timeout_s: float, trace: Trace | None = None) -> Reply:
        """Makes one call. Its reply is None if that cannot be parsed; else it is a message, or one of these errors.

        Unavailable: The connection has ended. CorruptReply: It has, since something came over it that was not sent like
        that. DeadlineExceeded: The reply did not come in time. Other MeshError: The other side refused the call.
        """
        reply = Reply(next(self._numbers), parse, self._leave)
        connection = self._connection
        if connection is None or self.ended.is_set():
            reply.settle(None, Unavailable(f"{self._service} does not answer", self._service))
        elif len(message) > self._max_message_bytes - FRAME_BYTES:
            text = f"a message of {len(message)} bytes is too large"
            reply.settle(None, from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, text, b"", self._service))
        else:
            self._pending[reply.call] = reply
            self._alarms.set(reply.expire, monotonic() + timeout_s)
            timeout_us, identity = int(timeout_s * 1e6), request_id.current()
            head = LinkRequest(call=reply.call, method=method, timeout_us=timeout_us, request_id=identity, trace=trace)
            connection.send(head, message)
        return reply

    async def _send_traced(self, method: str, message: bytes, parse: Parse, timeout_s: float) -> Any:
        """Makes one call in a span of its own; gives its reply, or raises its error."""
        with self._tracing.client_span(method) as trace:
            return await self._send(method, message, parse, timeout_s, trace)

    def _leave(self, reply: Reply) -> None:
        """Tells the other side that nobody waits for a reply any more."""
        if self._forget(reply.call) is not None and self._connection is not None:
            self._connection.send(LinkRequest(call=reply.call), b"")

    def _forget(self, call: int) -> Reply | None:
        """The reply that a call waits for, which does not wait any more."""
        reply = self._pending.pop(call, None)
        if reply is not None:
            self._alarms.withdraw(reply.expire)
        return reply

    async def _open_socket(self, on_end: OnEnd) -> None:
        path = self._address.removeprefix("unix:") + LINK_SUFFIX
        self._connection = await socket.connect(path, LinkResponse, self._take, on_end, self._max_message_bytes)

    async def _open_stream(self, on_end: OnEnd) -> None:
        call = LinkServiceStub(self._channel).Link()
        connection = StreamConnection(call, self._take, on_end)
        self._connection = connection

        async def run() -> None:
            try:
                await connection.run()
            finally:
                call.cancel()  # a stream that nobody reads any more is not ended by itself

        self._stream = asyncio.create_task(run())

    def _take(self, head: LinkResponse, message: bytes | memoryview) -> None:
        """Gives a reply to whoever waits for it."""
        if not head.call:
            self._meet(message)
            return
        reply = self._forget(head.call)
        if reply is None:
            return
        if head.code:
            code = STATUSES.get(head.code, grpc.StatusCode.UNKNOWN)
            reply.settle(None, from_status(code, head.text, head.details, self._service))
            return
        try:
            parsed = reply.parse(message)
        except DecodeError:
            parsed = None
        reply.settle(parsed)

    def _meet(self, message: bytes | memoryview) -> None:
        if self._introduced is None:
            return
        try:
            description = DescribeResponse.FromString(bytes(message))
        except DecodeError:
            if not self._introduced.done():
                self._introduced.set_exception(Unavailable("it cannot be understood", self._service))
            return
        self.is_draining = description.draining
        if not self._introduced.done():
            self.origin = Origin.of_description(description)
            self._introduced.set_result(None)
        elif self.is_draining:
            self.on_drain()

    def _end(self, opened: int) -> None:
        if opened != self._opened:
            return  # one of before, which has been told of late
        is_damaged = self._connection is not None and self._connection.is_damaged
        self._connection = None
        self.ended.set()
        gone = Unavailable(f"{self._service} does not answer", self._service)
        if self._introduced is not None and not self._introduced.done():
            self._introduced.set_exception(gone)
            self._introduced.exception()  # whoever opened it may have left already
        failed = CorruptReply("what came of it was changed on its way", self._service) if is_damaged else gone
        for call in list(self._pending):
            if (reply := self._forget(call)) is not None:
                reply.settle(None, failed)
        self._alarms.close()
