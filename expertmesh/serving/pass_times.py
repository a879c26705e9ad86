"""How long passes take, by their size and by how many are under way.

A pass takes longer if others share its devices, so passes of each level, which is how many are under way at once, have
times of their own. A level that was not seen yet is guessed from the last one, as if all shared one device. As long as
all passes of a level were of about one size, they grow step by step where deadlines are near.
"""

from __future__ import annotations

import time
from math import ceil

from expertmesh.rpc.deadline import Deadline
from expertmesh.serving.line import Line
from expertmesh.serving.shedding import bearable_s

MOST_SIZE = 2**62


class LevelTimes:
    """The passes of lately, of one level.

    Args:
        line: Of their sizes and times.
    """

    def __init__(self, line: Line) -> None:
        self._line = line

    @property
    def are_known(self) -> bool:
        """Whether there was a pass at all."""
        return self._line.is_known

    @property
    def usual_size(self) -> float:
        """The mean; only once some are known."""
        return self._line.mean_size

    def add(self, size: int, seconds: float) -> None:
        """Takes in a pass that was answered."""
        self._line.add(size, seconds)

    def add_lost(self, size: int, seconds: float) -> None:
        """Takes in a pass that was ended before it was answered, if it had taken longer than others by then."""
        if not self.are_known or seconds > self.of(size):
            self.add(size, seconds)

    def slowed(self, times: float) -> LevelTimes:
        """A guess of passes that take so many times as long."""
        return LevelTimes(self._line.slowed(times))

    def of(self, size: float) -> float:
        """Seconds that a pass of such a size takes; only once some are known."""
        return self._line.at(size)

    def left_s(self, size: int, started_s: float) -> float:
        """Seconds that a pass will still be under way."""
        return max(0.0, self.of(size) - (time.monotonic() - started_s))

    def is_hopeless(self, deadline: Deadline, size: int, waiting: int) -> bool:
        """Whether even the smallest pass that is made while so much waits is likely to come too late.

        Args:
            deadline: Of a call.
            size: What it would put into the pass at least.
            waiting: What it could share the pass with, itself included.
        """
        return self.are_known and bearable_s(deadline) < self.of(max(size, min(waiting, self._least)))

    def most(self, deadline: Deadline) -> int:
        """Size of the largest pass that is done in time if it starts now; never smaller than the least."""
        if not self.are_known:
            return MOST_SIZE
        if not self._line.is_spread:  # if all of it took its share, or else twice as much: so that is learnt
            per_s = self._line.mean_size / self._line.mean_s
            return max(2 * ceil(self._line.mean_size), int(bearable_s(deadline) * per_s))
        if self._line.unit_s <= 0:
            return MOST_SIZE
        return int(max((bearable_s(deadline) - self._line.always_s) / self._line.unit_s, self._least))

    @property
    def _least(self) -> float:
        """The size that costs as much as a pass itself; to keep to one deadline by less would cost all others more."""
        return self._line.always_s / self._line.unit_s if self._line.unit_s > 0 else MOST_SIZE


class PassTimes:
    """The passes of lately, by level."""

    def __init__(self) -> None:
        self._levels: dict[int, LevelTimes] = {}
        self._latest = 1

    def at(self, level: int) -> LevelTimes:
        """Those of one level."""
        times = self._levels.setdefault(level, LevelTimes(Line()))
        if times.are_known:
            self._latest = level
        elif self._latest in self._levels and self._latest != level:
            times = self._levels[level] = self._levels[self._latest].slowed(level / self._latest)
        return times
