"""An embedding that behaves as it is told to, from call to call."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from tests.doubles.honest import Honest


class Moody(Honest):
    """Like `Honest`, but for what is set.

    Attributes:
        delay_s: How long it takes.
        hangs: Whether it does not answer at all.
        code: The status that it answers with, if any.
        cancelled: How many calls were cancelled while they waited.
    """

    def __init__(self, number: float = 0.0) -> None:
        super().__init__(number)
        self.delay_s = 0.0
        self.hangs = False
        self.code: grpc.StatusCode | None = None
        self.cancelled = 0

    async def Embed(self, request: Any, context: Any) -> Any:
        try:
            if self.hangs:
                self.calls += 1
                await asyncio.Event().wait()
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.code is not None:
            self.calls += 1
            await context.abort(self.code, "not today")
        return await super().Embed(request, context)
