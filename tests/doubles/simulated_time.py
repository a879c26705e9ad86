"""Time that passes only while everybody waits, so that minutes of load take seconds to test."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar
from unittest import mock

ResultT = TypeVar("ResultT")


class SimulatedTime(selectors.SelectSelector):
    """A selector that skips the time it is told to wait."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def read(self) -> float:
        """Seconds that never go back."""
        return self.now_s

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits for something that never comes"
            self.now_s += timeout
        return ready


def run_simulated(main: Coroutine[Any, Any, ResultT]) -> ResultT:
    """Runs a coroutine in an event loop whose time, and that of `time.monotonic`, is simulated."""
    time = SimulatedTime()
    with mock.patch("time.monotonic", time.read):
        loop = asyncio.SelectorEventLoop(time)
        try:
            return loop.run_until_complete(main)
        finally:
            loop.close()
