"""The other side of a link: calls that come over it are served as if each had come by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from contextvars import copy_context
from functools import partial
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from expertmesh.errors import InvalidInput, Overloaded
from expertmesh.rpc import request_id
from expertmesh.rpc.guard import Failure, Guard
from expertmesh.rpc.interceptor import parsed
from expertmesh.rpc.link import socket
from expertmesh.rpc.link.channel import FRAME_BYTES
from expertmesh.rpc.link.context import LinkContext
from expertmesh.rpc.link.frames import Connection
from expertmesh.rpc.link.stream import StreamConnection
from expertmesh.rpc.settings import LINK_SUFFIX
from expertmesh.telemetry.tracing import OFF, Tracing
from expertmesh.v1 import link_pb2
from expertmesh.v1.description_pb2 import DescribeResponse
from expertmesh.v1.link_pb2 import LinkRequest, LinkResponse

MOST_CALLS = 1024  # under way on one link
QUIET_S = 0.3  # callers that send nothing for so long have let go
LOOK_EVERY_S = 0.02
Finish = Callable[["asyncio.Future[Any]"], "bytes | Failure"]
Start = Callable[[LinkRequest, Any, bool], "tuple[asyncio.Future[Any], Finish]"]


class LinkServicer:
    """Serves the unary methods of a program over links; generated `add_…_to_server` take it for a server.

    Args:
        guard: What stands around every call.
        tracing: Takes trace context over from every call.
        max_message_bytes: Largest message, in both directions.
    """

    def __init__(self, guard: Guard, tracing: Tracing = OFF, max_message_bytes: int = 64 * 2**20) -> None:
        self._guard = guard
        self._tracing = tracing
        self._max_message_bytes = max_message_bytes
        self._path2handler: dict[str, grpc.RpcMethodHandler] = {}
        self._direct: set[str] = set()
        self._links: set[_Calls] = set()
        self._one_ended = asyncio.Event()
        self._draining = False
        self.description = DescribeResponse()

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """As a server has it; what follows says the same by name."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
        """Takes the unary methods of a service; those that give a future, being no coroutines, need no task."""
        for name, handler in handlers.items():
            if not handler.request_streaming and not handler.response_streaming:
                path = f"/{service}/{name}"
                self._path2handler[path] = handler
                if not asyncio.iscoroutinefunction(handler.unary_unary):
                    self._direct.add(path)

    def add_to_server(self, server: grpc.aio.Server) -> str:
        """Offers links over streams of a gRPC server; gives the name of the service."""
        name: str = link_pb2.DESCRIPTOR.services_by_name["LinkService"].full_name
        handler = grpc.stream_stream_rpc_method_handler(self.Link, _parse_or_none, LinkResponse.SerializeToString)
        server.add_registered_method_handlers(name, {"Link": handler})
        return name

    @asynccontextmanager
    async def listening(self, listen: str) -> AsyncIterator[None]:
        """Offers links to neighbours, beside the address that gRPC listens on, while the context is open."""
        if not listen.startswith("unix:"):
            yield
            return
        async with socket.listening(listen.removeprefix("unix:") + LINK_SUFFIX, self._accept):
            yield

    def announce(self) -> None:
        """Tells whoever has a link that this process drains; calls are still served."""
        self.description.draining = True
        for calls in self._links:
            calls.introduce(self.description)

    async def let_go(self, is_idle: Callable[[], bool], timeout_s: float) -> None:
        """Waits until callers have let go: no link is left, or none has had a call for a while.

        Args:
            is_idle: Whether nothing is kept here for later calls.
            timeout_s: The longest that is waited.
        """
        quiet_since_s = time.monotonic()
        give_up_s = quiet_since_s + timeout_s
        taken = -1
        while self._links and time.monotonic() < give_up_s:
            now_taken = sum(calls.taken for calls in self._links)
            if now_taken != taken or any(calls.is_busy for calls in self._links) or not is_idle():
                taken, quiet_since_s = now_taken, time.monotonic()
            if time.monotonic() - quiet_since_s >= QUIET_S:
                return
            await asyncio.sleep(LOOK_EVERY_S)

    def drain(self) -> None:
        """Takes no more calls; links end when what is under way on them is done."""
        self._draining = True
        for calls in list(self._links):
            calls.settle()

    async def ended(self, grace_s: float) -> None:
        """Waits until every link has ended, which takes a `drain`; what is under way after the grace is cut off."""
        try:
            async with asyncio.timeout(grace_s):
                while self._links:
                    self._one_ended.clear()
                    await self._one_ended.wait()
        except TimeoutError:
            for calls in list(self._links):
                calls.cut_off()

    async def Link(self, requests: AsyncIterator[Any], context: grpc.aio.ServicerContext) -> None:
        """One link over a stream."""
        calls = self._calls()
        stream = StreamConnection(context, calls.take, calls.end, self._max_message_bytes)
        self._begin(calls, stream)
        try:
            await stream.run()
        finally:
            self._forget(calls)

    def _accept(self) -> socket.SocketConnection:
        """One link over a socket."""
        calls = self._calls()

        def begin() -> None:
            self._begin(calls, connection)

        def end() -> None:
            self._forget(calls)
            calls.end()

        most_bytes = self._max_message_bytes
        connection = socket.SocketConnection(LinkRequest, calls.take, end, most_bytes, begin, holds_back=True)
        return connection

    def _calls(self) -> _Calls:
        return _Calls(self._path2handler, self._start, lambda: len(self._links) == 1)

    def _begin(self, calls: _Calls, connection: Connection) -> None:
        self._links.add(calls)
        calls.connection = connection
        if self._draining:
            calls.settle()
        else:
            calls.introduce(self.description)

    def _forget(self, calls: _Calls) -> None:
        self._links.discard(calls)
        self._one_ended.set()

    def _start(self, request: LinkRequest, message: Any, is_alone: bool) -> tuple[asyncio.Future[Any], Finish]:
        """Starts a call; gives the future of what its method gives, and what makes its outcome of that."""
        request_id.take_over(request.request_id)
        if request.method not in self._direct or self._tracing.is_on:
            return asyncio.create_task(self._answer(request, message)), asyncio.Future.result
        handler, started_s = self._path2handler[request.method], time.monotonic()
        try:
            if isinstance(message, InvalidInput):
                raise message
            future = asyncio.ensure_future(handler.unary_unary(message, LinkContext(request.timeout_us, is_alone)))
        except (Exception, asyncio.CancelledError) as error:
            future = asyncio.get_running_loop().create_future()
            future.set_exception(error)

        def finish(ended: asyncio.Future[Any]) -> bytes | Failure:
            return self._guard.outcome(request.method, lambda: self._written(handler, ended.result()), started_s)

        return future, finish

    async def _answer(self, request: LinkRequest, message: Any) -> bytes | Failure:
        if not self._tracing.is_on:
            return await self._guard.run(request.method, self._reply(request, message))
        with self._tracing.server_span(request.method, request.trace):
            return await self._guard.run(request.method, self._reply(request, message))

    async def _reply(self, request: LinkRequest, message: Any) -> bytes:
        if isinstance(message, InvalidInput):
            raise message
        handler = self._path2handler[request.method]
        return self._written(handler, await handler.unary_unary(message, LinkContext(request.timeout_us)))

    def _written(self, handler: grpc.RpcMethodHandler, reply: Any) -> bytes:
        data: bytes = handler.response_serializer(reply)
        if len(data) > self._max_message_bytes - FRAME_BYTES:
            raise Overloaded(f"a reply of {len(data)} bytes is too large")
        return data


class _Calls:
    """The calls of one link; `taken` counts them.

    Args:
        path2handler: The methods there are.
        start: Starts a call; is given what the message holds, or the error that it could not be read, and whether no
            other call can have come.
        is_only: Whether no other link is there.
    """

    def __init__(
        self, path2handler: Mapping[str, grpc.RpcMethodHandler], start: Start, is_only: Callable[[], bool]
    ) -> None:
        self._path2handler, self._start, self._is_only = path2handler, start, is_only
        self._under_way: dict[int, asyncio.Future[Any]] = {}
        self._settling = False
        self.connection: Connection | None = None
        self.taken = 0

    @property
    def is_busy(self) -> bool:
        """Whether calls are under way."""
        return bool(self._under_way)

    def introduce(self, description: DescribeResponse) -> None:
        """Says who is here; again, when that has changed."""
        if self.connection is not None:
            self.connection.send(LinkResponse(), description.SerializeToString())

    def take(self, request: LinkRequest, message: bytes | memoryview) -> None:
        """Starts a call, or cancels one."""
        under_way = self._under_way.get(request.call)
        if not request.method or under_way is not None:
            if under_way is not None:
                under_way.cancel()
        elif self._settling:
            self._send(request.call, _refusal(grpc.StatusCode.UNAVAILABLE, "it is stopping"))
        elif len(self._under_way) >= MOST_CALLS:
            self._send(request.call, _refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at once"))
        elif (handler := self._path2handler.get(request.method)) is None:
            self._send(request.call, _refusal(grpc.StatusCode.UNIMPLEMENTED, "there is no such method"))
        else:
            try:
                read = parsed(message, handler.request_deserializer)
            except InvalidInput as error:
                read = error
            self.taken += 1
            is_alone = self.connection is not None and not self.connection.has_more and self._is_only()
            context = copy_context()  # a call's own, as a task has
            under_way, finish = context.run(self._start, request, read, is_alone)
            if under_way.done():
                context.run(self._answer, request.call, finish, under_way)
                return
            self._under_way[request.call] = under_way
            under_way.add_done_callback(partial(self._served, request.call, finish), context=context)

    def settle(self) -> None:
        """Ends the link as soon as no call is under way."""
        self._settling = True
        if not self._under_way and self.connection is not None:
            self.connection.finish()

    def cut_off(self) -> None:
        """Ends the link and what is under way on it."""
        if self.connection is not None:
            self.connection.close()
        self.end()

    def end(self) -> None:
        """Cancels what is under way, since nobody is there to hear of it."""
        self.connection = None
        for under_way in list(self._under_way.values()):
            under_way.cancel()

    def _served(self, call: int, finish: Finish, ended: asyncio.Future[Any]) -> None:
        del self._under_way[call]
        self._answer(call, finish, ended)
        if self._settling:
            self.settle()

    def _answer(self, call: int, finish: Finish, ended: asyncio.Future[Any]) -> None:
        try:
            self._send(call, finish(ended))
        except asyncio.CancelledError:
            self._send(call, _refusal(grpc.StatusCode.CANCELLED, "it was cancelled"))

    def _send(self, call: int, outcome: bytes | Failure) -> None:
        if self.connection is None:
            return
        if isinstance(outcome, Failure):
            code: int = outcome.code.value[0]
            self.connection.send(LinkResponse(call=call, code=code, text=outcome.text, details=outcome.details), b"")
        else:
            self.connection.send(LinkResponse(call=call), outcome)


def _refusal(code: grpc.StatusCode, text: str) -> Failure:
    return Failure(code, text)


def _parse_or_none(data: bytes) -> LinkRequest | None:
    """A frame; None, which ends the stream, for one that is damaged: gRPC would tell its peer the exception's text."""
    try:
        return LinkRequest.FromString(data)
    except DecodeError:
        return None
