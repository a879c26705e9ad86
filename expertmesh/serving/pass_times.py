"""How long passes take, by their size and by how many are under way: what every pass costs, and what its size adds.

A pass takes longer if others share its devices, so passes of each level, which is how many are under way at once, have
times of their own. A level that was not seen yet is guessed from the last one, as if all shared one device. Both
numbers of a level come of its passes of lately, the newer ones counting more (weighted least squares over a straight
line). As long as all were of about one size, size is taken to add nothing, and passes grow step by step where deadlines
are near.
"""

from __future__ import annotations

import time
from math import ceil

from expertmesh.rpc.deadline import Deadline
from expertmesh.serving.shedding import PATIENCE

FADES = 0.9  # of its weight a pass keeps when the next one comes in
MOST_SIZE = 2**62
LEAST_SPREAD = 0.01  # variance of sizes by the square of their mean, below which nothing is known of what size adds


class LevelTimes:
    """The passes of lately, of one level."""

    def __init__(self) -> None:
        self._weight = self._sizes = self._seconds = self._squares = self._products = 0.0

    @property
    def are_known(self) -> bool:
        """Whether there was a pass at all."""
        return self._weight > 0

    @property
    def usual_size(self) -> float:
        """The mean; only once some are known."""
        return self._sizes / self._weight

    def add(self, size: int, seconds: float) -> None:
        """Takes in a pass that was answered."""
        self._weight = FADES * self._weight + 1
        self._sizes = FADES * self._sizes + size
        self._seconds = FADES * self._seconds + seconds
        self._squares = FADES * self._squares + size * size
        self._products = FADES * self._products + size * seconds

    def add_lost(self, size: int, seconds: float) -> None:
        """Takes in a pass that was ended before it was answered, if it had taken longer than others by then."""
        if not self.are_known or seconds > self.of(size):
            self.add(size, seconds)

    def slowed(self, times: float) -> LevelTimes:
        """The same passes, as if each had taken so many times as long; together they weigh no more than one."""
        other, share = LevelTimes(), 1 / max(1.0, self._weight)
        other._weight, other._sizes, other._squares = share * self._weight, share * self._sizes, share * self._squares
        other._seconds, other._products = share * times * self._seconds, share * times * self._products
        return other

    def of(self, size: float) -> float:
        """Seconds that a pass of such a size takes; only once some are known."""
        pass_s, unit_s = self._line()
        return pass_s + unit_s * size

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
        return self.are_known and _bearable_s(deadline) < self.of(max(size, min(waiting, self._least())))

    def most(self, deadline: Deadline) -> int:
        """Size of the largest pass that is done in time if it starts now; never smaller than the least."""
        if not self.are_known:
            return MOST_SIZE
        seconds = _bearable_s(deadline)
        pass_s, unit_s = self._line()
        if not self._is_spread:  # if all of it took its share, or else twice as much: so that is learnt
            return max(2 * ceil(self._sizes / self._weight), int(seconds * self._sizes / self._seconds))
        if unit_s <= 0:
            return MOST_SIZE
        return int(max((seconds - pass_s) / unit_s, self._least()))

    def _least(self) -> float:
        """The size that costs as much as a pass itself; to keep to one deadline by less would cost all others more."""
        pass_s, unit_s = self._line()
        return pass_s / unit_s if unit_s > 0 else MOST_SIZE

    @property
    def _is_spread(self) -> bool:
        return self._variance >= LEAST_SPREAD * (self._sizes / self._weight) ** 2

    @property
    def _variance(self) -> float:
        return self._squares / self._weight - (self._sizes / self._weight) ** 2

    def _line(self) -> tuple[float, float]:
        """Seconds of every pass, and what each unit of size adds."""
        mean_size, mean_s = self._sizes / self._weight, self._seconds / self._weight
        if not self._is_spread:
            return mean_s, 0.0
        unit_s = max(0.0, (self._products / self._weight - mean_size * mean_s) / self._variance)
        unit_s = min(unit_s, mean_s / mean_size)
        return mean_s - unit_s * mean_size, unit_s


class PassTimes:
    """The passes of lately, by level."""

    def __init__(self) -> None:
        self._levels: dict[int, LevelTimes] = {}
        self._latest = 1

    def at(self, level: int) -> LevelTimes:
        """Those of one level."""
        times = self._levels.setdefault(level, LevelTimes())
        if times.are_known:
            self._latest = level
        elif self._latest in self._levels:
            times = self._levels[level] = self._levels[self._latest].slowed(level / self._latest)
        return times


def _bearable_s(deadline: Deadline) -> float:
    return PATIENCE * (deadline.at_s - time.monotonic())
