"""Alarms of which nearly all are withdrawn before they ring: one timer serves them all.

A timer of the event loop for each would cost a multiple, and stay in its heap for a while after it was cancelled.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from time import monotonic

Ring = Callable[[], None]


class Alarms:
    """Calls functions when they are due."""

    def __init__(self) -> None:
        self._ring2due_s: dict[Ring, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._next_s = inf

    def set(self, ring: Ring, due_s: float) -> None:
        """Has a function called at a time of `time.monotonic`; it is called once, and may be told from others."""
        self._ring2due_s[ring] = due_s
        if due_s < self._next_s:
            self._arm(due_s)

    def withdraw(self, ring: Ring) -> None:
        """Does not call it any more."""
        self._ring2due_s.pop(ring, None)

    def close(self) -> None:
        """Calls nothing any more."""
        self._ring2due_s.clear()
        self._disarm()

    def _arm(self, due_s: float) -> None:
        self._disarm()
        self._next_s = due_s
        self._timer = asyncio.get_running_loop().call_later(max(0.0, due_s - monotonic()), self._look)

    def _disarm(self) -> None:
        self._next_s = inf
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        """Calls what is due, and sets the timer for what is due next, which may have been withdrawn by then."""
        self._disarm()
        now_s = monotonic()
        for ring in [ring for ring, due_s in self._ring2due_s.items() if due_s <= now_s]:
            if self._ring2due_s.pop(ring, None) is not None:  # unless the one before has withdrawn it
                ring()
        if self._ring2due_s:
            due_s = min(self._ring2due_s.values())
            if due_s < self._next_s:
                self._arm(due_s)
