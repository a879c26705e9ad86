"""Server-sent events: a reply that is written while it is made, and ends with `data: [DONE]`."""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from expertmesh.errors import MeshError
from expertmesh.telemetry.logging import event

HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # the second is for a proxy in between


class EventStream(Response):
    """Sends each object as an event as soon as it is there; the next is asked for when the socket takes more.

    An error before the first event is raised, so that it becomes a reply of its own. A later one is sent as an event
    and ends the stream without `[DONE]`. If the caller goes away the objects are not waited for any longer.

    Args:
        objects: What to send; it is closed whatever happens.
        on_error: The reply for an error, whose body becomes the event.

    Attributes:
        status_code: Of the whole: that of the error if there was one, though 200 has been sent.

    Raises:
        MeshError: Nothing has been sent yet.
        ClientDisconnect: The caller has gone.
    """

    def __init__(
        self, objects: AsyncGenerator[dict[str, Any], None], on_error: Callable[[MeshError | str], Response]
    ) -> None:
        super().__init__(status_code=200, headers=HEADERS, media_type="text/event-stream")
        self._objects = objects
        self._on_error = on_error

    def init_headers(self, headers: Any = None) -> None:
        """A stream does not know its length."""
        super().init_headers(headers)
        self.raw_headers = [header for header in self.raw_headers if header[0] != b"content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all of it."""
        work = asyncio.create_task(self._send_all(send))
        left = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((work, left), return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            await work
        finally:
            for task in (work, left):
                task.cancel()
            await asyncio.gather(work, left, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        begun = False
        async with aclosing(self._objects) as objects:
            try:
                async for item in objects:
                    if not begun:
                        await self._begin(send)
                        begun = True
                    await _send_event(send, _dumps(item))
                    await asyncio.sleep(0)  # others' turn, however much is there to send; the caller may have gone too
                if not begun:
                    await self._begin(send)
                await _send_event(send, b"[DONE]")
            except MeshError as error:
                if not begun:
                    raise
                await self._send_error(send, error)
            except Exception:
                if not begun:
                    raise
                error_id = secrets.token_hex(8)
                event("internal_error", level=logging.ERROR, exc_info=True, error_id=error_id)
                await self._send_error(send, f"internal error {error_id}")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _begin(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})

    async def _send_error(self, send: Send, error: MeshError | str) -> None:
        reply = self._on_error(error)
        self.status_code = reply.status_code
        await _send_event(send, bytes(reply.body))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_event(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": b"data: " + data + b"\n\n", "more_body": True})


def _dumps(item: dict[str, Any]) -> bytes:
    return json.dumps(item, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
