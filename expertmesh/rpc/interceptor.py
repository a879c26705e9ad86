"""Puts the `Guard` around every call that comes by itself: unary methods, and our own with a stream of replies."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from expertmesh.errors import InvalidInput, Unavailable
from expertmesh.rpc import request_id
from expertmesh.rpc.errors import DETAILS_KEY
from expertmesh.rpc.guard import Failure, Guard, failure_of

OURS = "/expertmesh."
GRPCS = "/grpc."  # health and reflection, which answer to the end
STOPPING = Unavailable("it is stopping; others may not be", "")


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every unary method and our own streams of replies. Those of health and reflection pass through untouched.

    Args:
        guard: What stands around every call. Its origin is trailing metadata of every reply, of a stream initial.
    """

    def __init__(self, guard: Guard | None = None) -> None:
        self._guard = guard or Guard()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Gives the handler that runs instead of the registered one."""
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or handler.request_streaming:
            return handler
        if not handler.response_streaming:
            return self._unary(method, handler)
        return self._stream(method, handler) if method.startswith(OURS) else handler

    def _unary(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        async def work(data: bytes, context: grpc.aio.ServicerContext) -> Any:
            return await handler.unary_unary(parsed(data, handler.request_deserializer), context)

        async def guarded(data: bytes, context: grpc.aio.ServicerContext) -> Any:
            request_id.enter(context.invocation_metadata() or ())
            if self._guard.refuses and not method.startswith(GRPCS):
                await _abort(context, failure_of(method, STOPPING))
            with self._guard.under_way():
                outcome = await self._guard.run(method, work(data, context))
            if isinstance(outcome, Failure):
                await _abort(context, outcome)
            if self._guard.origin:
                context.set_trailing_metadata(self._guard.origin)
            return outcome

        return grpc.unary_unary_rpc_method_handler(guarded, None, handler.response_serializer)

    def _stream(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        async def guarded(data: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            started_s = time.monotonic()
            code: grpc.StatusCode | None = grpc.StatusCode.OK
            request_id.enter(context.invocation_metadata() or ())
            if self._guard.refuses:
                await _abort(context, failure_of(method, STOPPING))
            with self._guard.under_way():
                try:
                    if self._guard.origin:
                        await context.send_initial_metadata(self._guard.origin)  # it is needed before the end
                    request = parsed(data, handler.request_deserializer)
                    async with aclosing(handler.unary_stream(request, context)) as replies:
                        async for reply in replies:
                            yield reply
                except (asyncio.CancelledError, GeneratorExit):
                    code = grpc.StatusCode.CANCELLED
                    raise
                except grpc.aio.AbortError:
                    code = context.code() or grpc.StatusCode.UNKNOWN
                    raise
                except Exception as error:
                    failure, code = failure_of(method, error), None
                    self._guard.count(method, failure.code, started_s)  # before the caller can know of it
                    await _abort(context, failure)
                finally:
                    if code is not None:
                        self._guard.count(method, code, started_s)

        return grpc.unary_stream_rpc_method_handler(guarded, None, handler.response_serializer)


async def _abort(context: grpc.aio.ServicerContext, failure: Failure) -> None:
    details = ((DETAILS_KEY, failure.details),) if failure.details else ()
    await context.abort(failure.code, failure.text, details)


def parsed(data: bytes | memoryview, parse: Callable[[Any], Any]) -> Any:
    """A request from its bytes.

    Raises:
        InvalidInput: They are no such message.
    """
    try:
        return parse(data)
    except (DecodeError, UnicodeDecodeError, ValueError):
        raise InvalidInput("the message cannot be parsed: it is damaged, or a string in it is not UTF-8") from None
