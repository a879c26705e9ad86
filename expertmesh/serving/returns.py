"""Callers that ask again as soon as they are answered, and whether a pass should wait a moment for them.

A pass that starts with the first of them carries one text, and all others wait for it to end. So where most of those
that the last pass answered were lately back within a small part of its duration, the next one waits for them so long at
most. Where callers come by themselves nothing waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from expertmesh.serving.shedding import Smoothed

WAIT_SHARE = 0.25  # of what the last pass took
MOST_WAIT_S = 0.02
LEAST_BACK = 0.5  # of those that were answered have to be back within that time, as a rule


class Returns:
    """Watches who comes after a pass.

    Args:
        clock: Gives seconds that never go back.
    """

    def __init__(self, clock: Callable[[], float] = lambda: time.monotonic()) -> None:
        self._clock = clock
        self._answered = 0
        self._back = 0
        self._until_s = 0.0
        self._back_share = Smoothed()

    def answered(self, calls: int, pass_s: float) -> None:
        """A pass ended, and with it so many calls."""
        if self._answered > 1:
            self._back_share.add(min(1.0, self._back / self._answered))
        self._answered, self._back = calls, 0
        self._until_s = self._clock() + min(WAIT_SHARE * pass_s, MOST_WAIT_S)

    def came(self) -> None:
        """A call arrived."""
        self._back += self._clock() < self._until_s

    def wait_s(self) -> float:
        """How long the next pass should wait for those that are expected back."""
        is_rule = (self._back_share.value or 0.0) >= LEAST_BACK
        if not is_rule or self._answered < 2 or self._back >= self._answered:
            return 0.0
        return max(0.0, self._until_s - self._clock())
