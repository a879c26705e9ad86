"""The other side of a link: calls that come over it are served as if each had come by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from expertmesh.errors import InvalidInput, Overloaded
from expertmesh.rpc import request_id
from expertmesh.rpc.guard import Failure, Guard
from expertmesh.rpc.link import socket
from expertmesh.rpc.link.calls import Calls, Finish
from expertmesh.rpc.link.channel import FRAME_BYTES
from expertmesh.rpc.link.context import LinkContext
from expertmesh.rpc.link.frames import Connection
from expertmesh.rpc.link.stream import StreamConnection
from expertmesh.rpc.settings import LINK_SUFFIX
from expertmesh.telemetry.tracing import OFF, Tracing
from expertmesh.v1 import link_pb2
from expertmesh.v1.description_pb2 import DescribeResponse
from expertmesh.v1.link_pb2 import LinkRequest, LinkResponse

QUIET_S = 0.3  # callers that send nothing for so long have let go
LOOK_EVERY_S = 0.02
IDLE_S = 0.1  # a link that brought nothing for so long is not looked at before a call of another is computed


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
        self._links: set[Calls] = set()
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

    def _calls(self) -> Calls:
        return Calls(self._path2handler, self._start, self._others_are_quiet)

    def _others_are_quiet(self, own: Calls, now_s: float) -> bool:
        return all(one is own or now_s - one.taken_s > IDLE_S for one in self._links)

    def _begin(self, calls: Calls, connection: Connection) -> None:
        self._links.add(calls)
        calls.connection = connection
        if self._draining:
            calls.settle()
        else:
            calls.introduce(self.description)

    def _forget(self, calls: Calls) -> None:
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
            given = handler.unary_unary(message, LinkContext(request.timeout_us, is_alone))
            future = given if isinstance(given, asyncio.Future) else asyncio.ensure_future(given)
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


def _parse_or_none(data: bytes) -> LinkRequest | None:
    """A frame; None, which ends the stream, for one that is damaged: gRPC would tell its peer the exception's text."""
    try:
        return LinkRequest.FromString(data)
    except DecodeError:
        return None
