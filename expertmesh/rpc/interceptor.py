"""What happens around every unary call: parsing, timing, counting, and turning errors into statuses.

A caller never sees exception text: errors of our tree become their status, anything else INTERNAL with an id that
the log knows too.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from expertmesh.errors import DeadlineExceeded, InvalidInput, MeshError
from expertmesh.rpc import request_id
from expertmesh.rpc.errors import DETAILS_KEY, code_of, details_of, text_of
from expertmesh.telemetry import metrics
from expertmesh.telemetry.logging import event

Handler = Callable[[Any, grpc.aio.ServicerContext], Awaitable[Any]]


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every unary method. Streams (health watch, reflection) pass through untouched.

    Attributes:
        origin: Trailing metadata of every reply, which says what process gave it.
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
        if handler is None or handler.request_streaming or handler.response_streaming:
            return handler
        return grpc.unary_unary_rpc_method_handler(
            self._guarded(handler_call_details.method, handler.unary_unary, handler.request_deserializer),
            request_deserializer=None,
            response_serializer=handler.response_serializer,
        )

    def _guarded(self, method: str, run: Handler, parse: Callable[[bytes], Any]) -> Handler:
        async def guarded(data: bytes, context: grpc.aio.ServicerContext) -> Any:
            started_s = time.monotonic()
            code = grpc.StatusCode.OK
            id_of_request = request_id.enter(context.invocation_metadata() or ())
            try:
                reply = await run(_parsed(data, parse), context)
                if self.origin:
                    context.set_trailing_metadata(self.origin)
                return reply
            except MeshError as error:
                code = code_of(error)
                if code is grpc.StatusCode.INTERNAL:  # one that does not belong on the wire
                    await _abort_internal(method, context)
                await context.abort(code, text_of(error), ((DETAILS_KEY, details_of(error)),))
            except grpc.aio.AbortError:
                code = context.code() or grpc.StatusCode.UNKNOWN
                raise
            except asyncio.CancelledError:
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

        return guarded


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
