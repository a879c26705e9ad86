"""The other end of a `Link`: calls that come over a stream are served as if each had come by itself."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from expertmesh.errors import Overloaded, WrongPart
from expertmesh.rpc import request_id
from expertmesh.rpc.guard import Failure, Guard
from expertmesh.rpc.interceptor import parsed
from expertmesh.rpc.link import FRAME_BYTES
from expertmesh.telemetry.tracing import OFF, Tracing
from expertmesh.v1 import link_pb2
from expertmesh.v1.link_pb2 import LinkRequest, LinkResponse

MAX_CALLS = 1024  # under way on one stream


class LinkContext:
    """What a method may ask of a call that came over a stream."""

    def __init__(self, request: LinkRequest) -> None:
        self._ends_s = time.monotonic() + request.timeout_us / 1e6

    def time_remaining(self) -> float:
        """Seconds that the caller still waits."""
        return max(0.0, self._ends_s - time.monotonic())


class LinkServicer:
    """Serves the unary methods of a program over streams; generated `add_…_to_server` take it for a server.

    Args:
        guard: What stands around every call.
        tracing: Takes trace context over from every call.
        max_message_bytes: Largest message that the other side accepts.
    """

    def __init__(self, guard: Guard, tracing: Tracing = OFF, max_message_bytes: int = 64 * 2**20) -> None:
        self._path2handler: dict[str, grpc.RpcMethodHandler] = {}
        self._guard = guard
        self._tracing = tracing
        self._most_bytes = max_message_bytes - FRAME_BYTES
        self._draining = asyncio.Event()

    def add_generic_rpc_handlers(self, handlers: Sequence[Any]) -> None:
        """As a server has it; what follows says the same by name."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
        """Takes the unary methods of a service."""
        for name, handler in handlers.items():
            if not handler.request_streaming and not handler.response_streaming:
                self._path2handler[f"/{service}/{name}"] = handler

    def add_to_server(self, server: grpc.aio.Server) -> str:
        """Registers it and gives its name; frames are parsed here, so that a damaged one tells no exception text."""
        name: str = link_pb2.DESCRIPTOR.services_by_name["LinkService"].full_name
        handler = grpc.stream_stream_rpc_method_handler(self.Link, None, LinkResponse.SerializeToString)
        server.add_registered_method_handlers(name, {"Link": handler})
        return name

    def drain(self) -> None:
        """Takes no more calls; streams end when what is under way is done."""
        self._draining.set()

    async def Link(self, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext) -> None:
        """Serves calls until the stream ends, which cancels them, or until the program stops."""
        await context.send_initial_metadata(self._guard.origin)
        stream = _Stream(self._answer, context)
        reading = asyncio.create_task(stream.read(requests))
        draining = asyncio.create_task(self._draining.wait())
        try:
            await asyncio.wait([reading, draining], return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                await stream.settle()
        finally:
            reading.cancel()
            draining.cancel()
            await asyncio.gather(reading, draining, return_exceptions=True)
            await stream.close()

    async def _answer(self, request: LinkRequest) -> LinkResponse:
        with self._tracing.server_span(request.method, request.trace):
            request_id.take_over(request.request_id)
            outcome = await self._guard.run(request.method, self._call(request))
        if isinstance(outcome, Failure):
            code: int = outcome.code.value[0]
            return LinkResponse(call=request.call, code=code, text=outcome.text, details=outcome.details)
        return LinkResponse(call=request.call, message=outcome)

    async def _call(self, request: LinkRequest) -> bytes:
        handler = self._path2handler.get(request.method)
        if handler is None:
            raise WrongPart("this service has no such method")
        message = parsed(request.message, handler.request_deserializer)
        reply: bytes = handler.response_serializer(await handler.unary_unary(message, LinkContext(request)))
        if len(reply) > self._most_bytes:
            raise Overloaded(f"a reply of {len(reply)} bytes is too large")
        return reply


class _Stream:
    """The calls of one stream.

    Args:
        answer: Serves one.
        context: Of the stream.
    """

    def __init__(
        self, answer: Callable[[LinkRequest], Awaitable[LinkResponse]], context: grpc.aio.ServicerContext
    ) -> None:
        self._answer = answer
        self._context = context
        self._writing = asyncio.Lock()
        self._calls: dict[int, asyncio.Task[None]] = {}

    async def read(self, requests: AsyncIterator[bytes]) -> None:
        """Starts and cancels calls as the other side asks for it, until it ends the stream."""
        async for data in requests:
            try:
                request = LinkRequest.FromString(data)
            except DecodeError:
                return  # after it nothing can be told apart
            under_way = self._calls.get(request.call)
            if request.method and under_way is None:
                self._calls[request.call] = asyncio.create_task(self._serve(request))
            elif under_way is not None:
                under_way.cancel()

    async def settle(self) -> None:
        """Waits until no call is under way."""
        while self._calls:
            await asyncio.wait(list(self._calls.values()))

    async def close(self) -> None:
        """Cancels whatever is under way."""
        under_way = list(self._calls.values())
        for task in under_way:
            task.cancel()
        await asyncio.gather(*under_way, return_exceptions=True)

    async def _serve(self, request: LinkRequest) -> None:
        try:
            if len(self._calls) > MAX_CALLS:
                response = LinkResponse(
                    call=request.call, code=grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], text="too many calls at once"
                )
            else:
                response = await self._answer(request)
            async with self._writing:
                await self._context.write(response)
        finally:
            self._calls.pop(request.call, None)
