"""An HTTP endpoint: answers, turns errors into replies, and counts; whether it answers at once or as a stream."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Message, Receive, Scope, Send

from expertmesh.errors import MeshError, Unavailable
from expertmesh.telemetry import metrics, tracing
from expertmesh.telemetry.logging import event

CLIENT_CLOSED_REQUEST = 499  # as nginx names it; nobody is there to read it
AnswerT = TypeVar("AnswerT")


class Endpoint:
    """One path.

    Args:
        path: As the metrics name it.
        handler: Gives the reply, or raises MeshError.
        on_error: The reply for an error; for one that is no MeshError it gets a text that is fit to be shown.
    """

    def __init__(
        self,
        path: str,
        handler: Callable[[Request], Awaitable[Response]],
        on_error: Callable[[MeshError | str], Response],
    ) -> None:
        self._path = path
        self._handler = handler
        self._on_error = on_error

    def route(self, method: str) -> Route:
        """The route to this endpoint."""
        return Route(self._path, self, methods=[method])

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request; a reply that has begun is never followed by another."""
        started_s = time.monotonic()
        request = Request(scope, receive, send)
        status = CLIENT_CLOSED_REQUEST
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            response = await self._response(request, watched)
            if not begun:
                await response(scope, receive, watched)
            status = response.status_code
        except ClientDisconnect:
            pass
        finally:
            metrics.RPCS.labels(self._path, str(status)).inc()
            metrics.RPC_SECONDS.labels(self._path).observe(time.monotonic() - started_s)

    async def _response(self, request: Request, send: Send) -> Response:
        """The reply, sent already if all went well."""
        try:
            with tracing.http_span(f"{request.method} {self._path}", request.headers):
                response = await self._handler(request)
                await response(request.scope, request.receive, send)
                return response
        except MeshError as error:
            return self._on_error(error)
        except ClientDisconnect:
            raise
        except asyncio.CancelledError:  # only a stop of the server does that; there is nobody to tell it to
            return self._on_error(Unavailable("the gateway is stopping", "gateway"))
        except Exception:
            error_id = secrets.token_hex(8)
            event("internal_error", level=logging.ERROR, exc_info=True, method=self._path, error_id=error_id)
            return self._on_error(f"internal error {error_id}")


async def unless_left(request: Request, answer: Coroutine[Any, Any, AnswerT]) -> AnswerT:
    """Waits for an answer; work for a caller that has gone is cancelled.

    Raises:
        ClientDisconnect: The caller has gone.
    """
    work = asyncio.create_task(answer)
    left = asyncio.ensure_future(request.receive())
    waits: list[asyncio.Future[Any]] = [work, left]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return await work
        raise ClientDisconnect
    finally:
        for task in (work, left):
            task.cancel()
        await asyncio.gather(work, left, return_exceptions=True)
