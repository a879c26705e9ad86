"""An embedding that takes calls and never answers; it tells when one of them is cancelled."""

from __future__ import annotations

import asyncio
from typing import Any

from tests.doubles.honest import Honest


class Hanging(Honest):
    def __init__(self) -> None:
        super().__init__()
        self.cancelled = asyncio.Event()

    async def Embed(self, request: Any, context: Any) -> Any:
        self.calls += 1
        self.arrived.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
