"""Refuses what could not be answered in time anyway, so that what is taken on still is.

Estimates come of what was measured here, and are on the hopeful side: where nothing was measured, or nothing waits,
nobody is refused.
"""

from __future__ import annotations

import time

from expertmesh.errors import Overloaded
from expertmesh.rpc.deadline import Deadline
from expertmesh.telemetry import metrics

PATIENCE = 0.8  # of what is left to a caller may be used up by what it is expected to take
NEWEST_SHARE = 0.2
QUANTILE_STEP = 0.05
LEAST_RETRY_S, MOST_RETRY_S = 0.05, 30.0


class Smoothed:
    """A mean in which the newest value counts for a fifth, and each older one for less."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Takes in one more."""
        self.value = value if self.value is None else self.value + NEWEST_SHARE * (value - self.value)


class Quantile:
    """What a share of all values of lately is not above.

    Args:
        share: Which share.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self.value: float | None = None

    def add(self, value: float) -> None:
        """Takes in one more."""
        if self.value is None:
            self.value = value
        else:
            self.value *= 1 + QUANTILE_STEP * (self._share if value > self.value else self._share - 1)


def bearable_s(deadline: Deadline) -> float:
    """How long something may be expected to take that starts now and is to be done in time."""
    return PATIENCE * (deadline.at_s - time.monotonic())


def refuse_late(queue: str, expected_s: float, deadline: Deadline) -> None:
    """Refuses what is expected to take too long.

    Raises:
        Overloaded: It would not be done by then; says when trying again makes sense.
        DeadlineExceeded: The deadline has passed already.
    """
    left_s = PATIENCE * deadline.remaining_s()
    if expected_s > left_s:
        metrics.SHED.labels(queue, "late").inc()
        text = f"an answer would take about {expected_s:.1f} s, which is too late"
        raise Overloaded(text, retry_after(expected_s - left_s))


def refuse_full(queue: str, waiting: str, expected_s: float | None) -> Overloaded:
    """What is told to those that find no place to wait."""
    metrics.SHED.labels(queue, "full").inc()
    return Overloaded(f"{waiting} are waiting already", 1.0 if expected_s is None else retry_after(expected_s))


def dropped(queue: str, expected_s: float) -> Overloaded:
    """What is told to those that waited and cannot make it any more."""
    metrics.SHED.labels(queue, "dropped").inc()
    return Overloaded("it waited until there was too little time left for it", retry_after(expected_s))


def retry_after(seconds: float) -> float:
    """When trying again makes sense, within bounds."""
    return min(max(seconds, LEAST_RETRY_S), MOST_RETRY_S)
