"""The body of an HTTP request: read with a limit of size and time, and understood as one JSON object."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from starlette.requests import Request

from expertmesh.errors import InvalidInput

BODY_TIMEOUT_S = 10.0
# What a body of a few MiB may be made of. Millions of small lists would hold up everybody else for a second.
MAX_BRACKETS = 2**17
MAX_COMMAS = 2**20


async def read(request: Request, max_bytes: int) -> bytes:
    """The body, given up as soon as it is too large or too slow.

    Raises:
        InvalidInput: It has more than `max_bytes`, or took longer than `BODY_TIMEOUT_S`.
    """
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                data += chunk
                if len(data) > max_bytes:
                    raise InvalidInput(f"the body has more than {max_bytes} bytes")
    except TimeoutError:
        raise InvalidInput(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None
    return bytes(data)


def parse_object(data: bytes, example: str) -> dict[str, Any]:
    """The JSON object that a body holds; it has no NaN and no infinity, which JSON does not know.

    Args:
        data: The body.
        example: What to send, for whoever sent something else.

    Raises:
        InvalidInput: It is something else, or made of too many pieces.
    """
    if data.count(b"[") + data.count(b"{") > MAX_BRACKETS or data.count(b",") > MAX_COMMAS:
        raise InvalidInput(f"the body has more than {MAX_BRACKETS} brackets or {MAX_COMMAS} commas; send less at once")
    try:
        values = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise InvalidInput(f"the body is no JSON in UTF-8; send {example}") from None
    if not isinstance(values, dict):
        raise InvalidInput(f"the body must be {example}")
    return values


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
