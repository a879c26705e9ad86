"""The id of a request: made where it enters the mesh, carried as metadata on every hop, told in replies and logs."""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from contextvars import ContextVar

KEY = "expertmesh-request-id"

_CURRENT: ContextVar[str] = ContextVar("request_id", default="")
_WELL_FORMED = re.compile(r"[0-9A-Za-z_-]{1,64}")


def enter(metadata: Sequence[tuple[str, str | bytes]]) -> str:
    """Takes over the id that a call carries; empty if it carries none, or one that is not well formed."""
    given = next((value for key, value in metadata if key == KEY), "")
    return take_over(given if isinstance(given, str) else "")


def take_over(given: str) -> str:
    """Takes over an id; empty if it is not well formed."""
    request_id = given if _WELL_FORMED.fullmatch(given) else ""
    _CURRENT.set(request_id)
    return request_id


def current() -> str:
    """The id of the request that is being served; empty if it has none."""
    return _CURRENT.get()


def current_or_new() -> str:
    """The id of the request that is being served; a new one if it has none yet."""
    if not _CURRENT.get():
        _CURRENT.set(secrets.token_hex(8))
    return _CURRENT.get()


def to_metadata() -> tuple[tuple[str, str], ...]:
    """What a call on behalf of the current request carries."""
    return ((KEY, _CURRENT.get()),) if _CURRENT.get() else ()
