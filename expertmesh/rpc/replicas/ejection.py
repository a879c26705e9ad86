"""What one replica did lately, when that is reason to leave it, and for how long it is left.

Three things are: a reply that cannot be right, failing again and again, and being much slower than its peers. A replica
that is left is asked again after a pause, which doubles with every relapse; see `probation` for what it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from math import nan
from time import monotonic

PAUSE_FIRST_S = 1.0
PAUSE_MOST_S = 4.0  # whoever is mended is back within 5 s
FORGIVEN_S = 60.0  # a relapse is what comes sooner than this
FAILURES_IN_ROW = 3
LATE_IN_ROW = 3
FAILING_SHARE = 0.2  # of its calls, beyond twice what its peers fail
SLOW_TIMES = 4.0  # as slow as its peers
SLOW_S = 0.02  # and slower than what a busy core explains
LEAST = 16  # answers before a replica is called slow
_SHARE_WEIGHT = 0.05  # of the last call in what is known of all
_MOST_SLOWNESS = 10.0  # one answer that was very late is no habit


class Why(Enum):
    """Why a replica is left."""

    WRONG = "wrong"
    FAILING = "failing"
    SLOW = "slow"


class Record:
    """What is known of one replica since it was last left.

    Args:
        clock: Tells the time, in seconds.

    Attributes:
        why: Why it was left and has not returned yet; None if it is in the traffic.
        differs: Whether it was seen to compute other bits than another; only equal ones, or a new connection, which may
            be to a new process, make up for that.
        slowness: How long its answers take, as multiples of the median of calls like them.
        failing_share: Share of its calls that failed.
    """

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._pause_s = PAUSE_FIRST_S
        self._left_s = self._until_s = -FORGIVEN_S
        self._failures_in_row = self._late_in_row = self._answers = 0
        self.failing_share, self.slowness = 0.0, 1.0
        self.why: Why | None = None
        self.differs = False

    @property
    def pause_s(self) -> float:
        """How much longer it is left alone; negative if it may prove itself."""
        return self._until_s - self._clock()

    def answered(self, took_s: float = 0.0, median_s: float = nan) -> None:
        """It answered rightly; where known, in so much time where calls like it take `median_s`."""
        self._failures_in_row = self._late_in_row = 0
        if self.failing_share:
            self.failing_share *= 1 - _SHARE_WEIGHT
        if median_s > 0:
            self._compare(took_s / median_s)

    def late(self, waited_s: float, median_s: float) -> None:
        """It had not answered after so long, when another did in its place."""
        self._late_in_row += 1
        if median_s > 0:
            self._compare(waited_s / median_s)

    def failed(self) -> None:
        """It failed, by a status or by taking too long."""
        self._failures_in_row += 1
        self.failing_share += _SHARE_WEIGHT * (1 - self.failing_share)

    def is_failing(self, peers: Sequence[Record]) -> str:
        """In words, why it is to be left for failing; empty if it is not."""
        if self._failures_in_row >= FAILURES_IN_ROW:
            return f"it failed {self._failures_in_row} times in a row"
        usual = sum(peer.failing_share for peer in peers) / len(peers) if peers else 1.0
        if self.failing_share > FAILING_SHARE + 2 * usual:
            return f"about {self.failing_share:.0%} of its calls failed, of its peers' {usual:.0%}"
        return ""

    def is_slow(self, peers: Sequence[Record]) -> str:
        """In words, why it is to be left for being slow; empty if it is not, or if it has no peers."""
        if not peers:
            return ""
        if self._late_in_row >= LATE_IN_ROW:
            return f"others answered in its place {self._late_in_row} times in a row"
        usual = sum(peer.slowness for peer in peers) / len(peers)
        if self._answers >= LEAST and self.slowness > SLOW_TIMES * max(1.0, usual):
            return f"it is {self.slowness / max(1.0, usual):.0f} times as slow as its peers"
        return ""

    def leave(self, why: Why) -> float:
        """It is left; gives for how long, in seconds."""
        now_s = self._clock()
        is_relapse = now_s - self._left_s < FORGIVEN_S
        pause_s = self._pause_s = min(2 * self._pause_s, PAUSE_MOST_S) if is_relapse else PAUSE_FIRST_S
        self._left_s, self._until_s = now_s, now_s + pause_s
        self.why = why
        self._forget()
        return pause_s

    def _compare(self, ratio: float) -> None:
        self._answers += 1
        self.slowness += _SHARE_WEIGHT * ((ratio if ratio < _MOST_SLOWNESS else _MOST_SLOWNESS) - self.slowness)

    def _forget(self) -> None:
        self._failures_in_row = self._late_in_row = self._answers = 0
        self.failing_share, self.slowness = 0.0, 1.0
