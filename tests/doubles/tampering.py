"""A servicer whose replies are tampered with: one method of an honest one goes wrong, always or a few times."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

Tamper = Callable[[Any, Any], Awaitable[Any]]


class Tampering:
    """Passes everything on to an honest servicer, but for what one method gives.

    Args:
        honest: The servicer.
        method: The name of its method.
        tamper: Is given the honest reply and the call's context; gives another, raises, aborts or hangs.

    Attributes:
        times: How often it still does so.
        calls: How often it did.
    """

    def __init__(self, honest: Any, method: str, tamper: Tamper) -> None:
        self.times = 10**9
        self.calls = 0
        self._honest = honest
        self._method = method
        self._tamper = tamper

    def __getattr__(self, name: str) -> Any:
        call = getattr(self._honest, name)
        if name != self._method:
            return call

        async def tampered(request: Any, context: Any) -> Any:
            reply = await call(request, context)
            if self.times <= 0:
                return reply
            self.times -= 1
            self.calls += 1
            return await self._tamper(reply, context)

        return tampered
