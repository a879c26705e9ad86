"""What happens around every call: parsing, timing, counting, and turning errors into statuses.

A caller never sees exception text: errors of our tree become their status, anything else INTERNAL with an id that
the log knows too.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from expertmesh.errors import DeadlineExceeded, InvalidInput, MeshError
from expertmesh.rpc import request_id
from expertmesh.rpc.errors import DETAILS_KEY, code_of, details_of, text_of
from expertmesh.telemetry import metrics
from expertmesh.telemetry.logging import event

OURS = "/expertmesh."


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every unary method and our own streams of replies. Those of health and reflection pass through untouched.

    Attributes:
        origin: Trailing metadata of every reply, of a stream initial metadata, which says what process gave it.
    """

    def __init__(self) -> None:
        self.origin: tuple[tuple[str, str], ...] = ()

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
        async def guarded(data: bytes, context: grpc.aio.ServicerContext) -> Any:
            async with self._around(method, context):
                reply = await handler.unary_unary(_parsed(data, handler.request_deserializer), context)
                if self.origin:
                    context.set_trailing_metadata(self.origin)
                return reply

        return grpc.unary_unary_rpc_method_handler(guarded, None, handler.response_serializer)

    def _stream(self, method: str, handler: grpc.RpcMethodHandler) -> grpc.RpcMethodHandler:
        async def guarded(data: bytes, context: grpc.aio.ServicerContext) -> AsyncIterator[Any]:
            async with self._around(method, context):
                if self.origin:
                    await context.send_initial_metadata(self.origin)  # with a stream it is needed before the end
                request = _parsed(data, handler.request_deserializer)
                async with aclosing(handler.unary_stream(request, context)) as replies:
                    async for reply in replies:
                        yield reply

        return grpc.unary_stream_rpc_method_handler(guarded, None, handler.response_serializer)

    @asynccontextmanager
    async def _around(self, method: str, context: grpc.aio.ServicerContext) -> AsyncIterator[None]:
        """Times and counts a call, and turns what it raises into its status."""
        started_s = time.monotonic()
        code = grpc.StatusCode.OK
        id_of_request = request_id.enter(context.invocation_metadata() or ())
        try:
            yield
        except MeshError as error:
            code = code_of(error)
            if code is grpc.StatusCode.INTERNAL:  # one that does not belong on the wire
                await _abort_internal(method, context)
            await context.abort(code, text_of(error), ((DETAILS_KEY, details_of(error)),))
        except grpc.aio.AbortError:
            code = context.code() or grpc.StatusCode.UNKNOWN
            raise
        except (asyncio.CancelledError, GeneratorExit):
            code = grpc.StatusCode.CANCELLED
            raise
        except TimeoutError:
            code = grpc.StatusCode.DEADLINE_EXCEEDED
            late = DeadlineExceeded("the deadline has passed")
            await context.abort(code, str(late), ((DETAILS_KEY, details_of(late)),))
        except Exception:
            code = grpc.StatusCode.INTERNAL
            await _abort_internal(method, context)
        finally:
            metrics.RPCS.labels(method, code.name).inc()
            took_s = time.monotonic() - started_s
            metrics.RPC_SECONDS.labels(method).observe(took_s)
            event("call", level=logging.DEBUG, method=method, code=code.name, seconds=took_s, request=id_of_request)


async def _abort_internal(method: str, context: grpc.aio.ServicerContext) -> None:
    """Ends a call with an id in place of the exception that is being handled; the log has both."""
    error_id = secrets.token_hex(8)
    event("internal_error", level=logging.ERROR, exc_info=True, method=method, error_id=error_id)
    await context.abort(grpc.StatusCode.INTERNAL, f"internal error {error_id}")


def _parsed(data: bytes, parse: Callable[[bytes], Any]) -> Any:
    try:
        return parse(data)
    except (DecodeError, UnicodeDecodeError, ValueError):
        raise InvalidInput("the message cannot be parsed: it is damaged, or a string in it is not UTF-8") from None
