"""Sequences that have to be computed anew: how many, how long ones and how fast, so that a death is no storm.

What is computed anew is paid for in token rows, of which so many come in every second; those that run go on decoding
meanwhile. The shortest is the next: so most streams go on soonest.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from expertmesh.errors import Unavailable
from expertmesh.serving.generation import Generation
from expertmesh.telemetry import metrics

MAX_LOSSES = 8
BURST_S = 1.0  # the rows of so many seconds may be spent at once


@dataclass(frozen=True)
class RebuildLimits:
    """How much is computed anew.

    Attributes:
        rows_per_s: Token rows a second; 0 for as many as there are.
        most_tokens: Of a sequence; a longer one is given up. 0 for any.
    """

    rows_per_s: int = 4096
    most_tokens: int = 0


class Rebuilds:
    """Sequences that wait to be computed anew.

    Args:
        limits: How much is computed anew.
        wake: Is called when more may be.
        clock: Tells the time, in seconds.
    """

    def __init__(
        self, limits: RebuildLimits, wake: Callable[[], None], clock: Callable[[], float] = lambda: time.monotonic()
    ) -> None:
        self._limits = limits
        self._wake = wake
        self._clock = clock
        self._most = limits.rows_per_s * BURST_S
        self._rows = self._most  # what may be spent; below 0 where a long one was taken
        self._counted_s = clock()
        self._waiting: list[Generation] = []
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, generations: Sequence[Generation]) -> None:
        """Takes sequences on, and ends those that are too long or were lost too often."""
        for generation in generations:
            if generation.losses > MAX_LOSSES:
                generation.fail(Unavailable("its KV cache was lost again and again", "gating"))
            elif not self.takes(generation):
                most = self._limits.most_tokens
                text = f"{len(generation.ids)} tokens would have to be computed anew; that is done for at most {most}"
                generation.fail(Unavailable(text, "gating"))
            else:
                self._waiting.append(generation)
        self._waiting.sort(key=lambda one: len(one.ids))  # of equals whoever came first

    def takes(self, generation: Generation) -> bool:
        """Whether a sequence is not too long."""
        return not 0 < self._limits.most_tokens < len(generation.ids)

    def due(self) -> list[Generation]:
        """Takes out those that may be computed anew now; it will call when there are more."""
        now_s = self._clock()
        self._rows = min(self._most, self._rows + (now_s - self._counted_s) * self._limits.rows_per_s)
        self._counted_s = now_s
        self._waiting = [one for one in self._waiting if not one.left]
        taken = 0
        while taken < len(self._waiting) and (self._rows > 0 or not self._limits.rows_per_s):
            self._rows -= len(self._waiting[taken].ids)
            taken += 1
        due, self._waiting = self._waiting[:taken], self._waiting[taken:]
        metrics.REBUILDS.inc(taken)
        metrics.REBUILT_ROWS.inc(sum(len(one.ids) for one in due))
        self._call_later()
        return due

    def fail(self, error: Callable[[], Unavailable]) -> None:
        """Ends all."""
        for generation in self._waiting:
            generation.fail(error())
        self._waiting = []
        self.close()

    def discard(self, generation: Generation) -> None:
        """Forgets one for which nobody waits."""
        if generation in self._waiting:
            self._waiting.remove(generation)

    def close(self) -> None:
        """Calls nobody any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _call_later(self) -> None:
        self.close()
        if self._waiting:
            wait_s = max(0.001, -self._rows / self._limits.rows_per_s)
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._wake)
