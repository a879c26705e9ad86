"""A channel whose unary calls travel over one long-lived stream, which costs less than half of calls of their own.

Stubs take it in place of a gRPC channel. A call over it has its deadline, can be cancelled, carries request id and
trace context, and ends with one status. It does not retry, balance or reconnect; see `replica` for who does.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from itertools import count
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from expertmesh.rpc import request_id
from expertmesh.rpc.errors import DETAILS_KEY, STATUSES
from expertmesh.telemetry.tracing import OFF, Tracing
from expertmesh.v1.link_pb2 import LinkRequest, LinkResponse
from expertmesh.v1.link_pb2_grpc import LinkServiceStub

FRAME_BYTES = 1024  # room for what a frame has beside its message
Metadata = tuple[tuple[str, str | bytes], ...]


class Link:
    """One stream to one process, made anew by `open` whenever the last one has ended.

    Args:
        channel: Over which the stream goes.
        tracing: Carries trace context on every call.
        max_message_bytes: Largest message that the other side accepts.
    """

    def __init__(self, channel: grpc.aio.Channel, tracing: Tracing = OFF, max_message_bytes: int = 64 * 2**20) -> None:
        self._channel = channel
        self._tracing = tracing
        self._most_bytes = max_message_bytes - FRAME_BYTES
        self._numbers = count(1)
        self._pending: dict[int, asyncio.Future[LinkResponse]] = {}
        self._outgoing: deque[LinkRequest] = deque()
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._stream: Any = None
        self.origin: Metadata = ()
        self.ended = asyncio.Event()
        self.ended.set()

    async def open(self, timeout_s: float) -> None:
        """Opens a stream and hears who is at its other end.

        Raises:
            grpc.aio.AioRpcError: Nobody answers, or not in time.
        """
        await self.close()
        stream = LinkServiceStub(self._channel).Link()
        try:
            async with asyncio.timeout(timeout_s):
                metadata = await stream.initial_metadata()
        except (TimeoutError, asyncio.InvalidStateError):
            stream.cancel()
            raise _failed(grpc.StatusCode.UNAVAILABLE, "its stream did not open in time") from None
        except BaseException:
            stream.cancel()
            raise
        self.origin = tuple(metadata)
        self._stream = stream
        self.ended.clear()
        self._tasks = [asyncio.create_task(self._read(stream)), asyncio.create_task(self._write(stream))]

    async def close(self) -> None:
        """Ends the stream; what is under way fails."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._end()

    def unary_unary(
        self,
        method: str,
        request_serializer: Callable[[Any], bytes],
        response_deserializer: Callable[[bytes], Any],
        _registered_method: bool = False,
    ) -> Callable[..., LinkCall]:
        """One method, as stubs ask a channel for it."""

        def call(request: Any, timeout: float, metadata: Metadata = ()) -> LinkCall:
            return LinkCall(self, method, request_serializer(request), response_deserializer, timeout)

        return call

    def unary_stream(self, *args: Any, **kwargs: Any) -> Any:
        """A method with a stream of replies, which has a call of its own."""
        return self._channel.unary_stream(*args, **kwargs)

    async def call(self, method: str, message: bytes, timeout_s: float) -> LinkResponse:
        """Sends one call and waits for its reply.

        Raises:
            grpc.aio.AioRpcError: The stream has ended, or the reply did not come in time.
        """
        if self.ended.is_set():
            raise _failed(grpc.StatusCode.UNAVAILABLE, "its stream has ended")
        if len(message) > self._most_bytes:
            raise _failed(grpc.StatusCode.RESOURCE_EXHAUSTED, f"a message of {len(message)} bytes is too large")
        loop = asyncio.get_running_loop()
        number = next(self._numbers)
        reply: asyncio.Future[LinkResponse] = loop.create_future()
        self._pending[number] = reply
        timer = loop.call_later(timeout_s, _expire, reply)
        try:
            with self._tracing.client_span(method) as trace:
                self._send(
                    LinkRequest(
                        call=number,
                        method=method,
                        timeout_us=int(timeout_s * 1e6),
                        request_id=request_id.current(),
                        trace=trace,
                        message=message,
                    )
                )
                return await reply
        except BaseException:
            if not self.ended.is_set():
                self._send(LinkRequest(call=number))  # nobody waits for it any more
            raise
        finally:
            timer.cancel()
            self._pending.pop(number, None)

    def _send(self, frame: LinkRequest) -> None:
        self._outgoing.append(frame)
        self._wake.set()

    async def _write(self, stream: Any) -> None:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):  # whoever reads is told why
            while True:
                while self._outgoing:
                    await stream.write(self._outgoing.popleft())
                self._wake.clear()
                await self._wake.wait()

    async def _read(self, stream: Any) -> None:
        try:
            while True:
                response = await stream.read()
                if response is grpc.aio.EOF or response is None:
                    return
                waiting = self._pending.get(response.call)
                if waiting is not None and not waiting.done():
                    waiting.set_result(response)
        except grpc.aio.AioRpcError:
            return
        finally:
            self._end()

    def _end(self) -> None:
        if self._stream is not None:
            self._stream.cancel()
            self._stream = None
        self.ended.set()
        self._outgoing.clear()
        for waiting in self._pending.values():
            if not waiting.done():
                waiting.set_exception(_failed(grpc.StatusCode.UNAVAILABLE, "its stream has ended"))


class LinkCall:
    """A call that is made when it is awaited, with the face of one over a channel."""

    def __init__(
        self, link: Link, method: str, message: bytes, parse: Callable[[bytes], Any], timeout_s: float
    ) -> None:
        self._link, self._method, self._message, self._parse = link, method, message, parse
        self._timeout_s = timeout_s

    def __await__(self) -> Generator[Any, None, Any]:
        return self._reply().__await__()

    async def trailing_metadata(self) -> Metadata:
        """What process gave the reply."""
        return self._link.origin

    async def _reply(self) -> Any:
        response = await self._link.call(self._method, self._message, self._timeout_s)
        if response.code:
            details: Metadata = ((DETAILS_KEY, response.details),) if response.details else ()
            raise _failed(STATUSES.get(response.code, grpc.StatusCode.UNKNOWN), response.text, details)
        try:
            return self._parse(response.message)
        except DecodeError:
            return None  # as gRPC gives it


def _expire(reply: asyncio.Future[LinkResponse]) -> None:
    if not reply.done():
        reply.set_exception(_failed(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline has passed"))


def _failed(code: grpc.StatusCode, text: str, details: Metadata = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*details), text)
