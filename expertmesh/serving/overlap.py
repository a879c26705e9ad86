"""How many pieces of work are best under way at once: found by measurement, since it depends on who shares what.

Where all processes share the same cores, two half steps cost more than a whole one, for every weight is read twice.
Where stages have devices of their own, one half is in attention while the other is with the experts, and two are up to
twice as fast. So both are tried in turn, and the faster one is kept until the next trial. This module starts nothing
and waits for nothing; it is told what started and what ended.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

MOST_LEVEL = 8
ROUNDS = 3  # a turn of a trial lasts until each place was used so often
TURNS = 5  # of each level in a trial; of an odd number the median is one of them
CLEAR_TURNS = 2  # of each are enough where every one of one level is better than every one of the other
BETTER = 1.08  # more at once must be so much faster; fewer at once need only be no slower
HOLD_TRIALS = 20  # what was decided holds at least so many times as long as the trial took
HOLD_S, MOST_HOLD_S = 1.0, 60.0  # and grows from trial to trial that changes nothing


@dataclass(eq=False)
class _Trial:
    """Compares the level that was chosen for a certain load with its neighbours, one after the other."""

    most: int
    chosen: int
    up: bool = True
    hold_s: float = HOLD_S
    held_until_s: float = 0.0
    started_s: float | None = None
    at: int = 0  # the level whose turn it is
    other: int = 0
    rates: dict[int, list[float]] = field(default_factory=dict)
    turn_work: float = 0.0
    turn_s: float = 0.0
    turn_ends: int = 0

    def level(self, now_s: float) -> int:
        """What is to be under way now."""
        if now_s < self.held_until_s or self.most == 1:
            return self.chosen
        if self.started_s is None:
            self._begin(now_s)
        return self.at

    def observe(self, level: int, work: float, seconds: float, now_s: float) -> None:
        """So much work ended within so many seconds, during which so many pieces were under way."""
        if self.started_s is None or level != self.at:
            return
        self.turn_work += work
        self.turn_s += seconds
        self.turn_ends += 1
        if self.turn_ends < ROUNDS * level or not self.turn_s:
            return
        self.rates[level].append(self.turn_work / self.turn_s)
        self.at = self.chosen + self.other - level
        self._begin_turn()
        if len(self.rates[self.at]) == len(self.rates[level]) and self._is_clear():
            self._decide(now_s)

    def _begin(self, now_s: float) -> None:
        if not 1 <= self._neighbour() <= self.most:
            self.up = not self.up
        self.other = self._neighbour()
        self.started_s, self.at = now_s, self.chosen
        self.rates = {self.chosen: [], self.other: []}
        self._begin_turn()

    def _begin_turn(self) -> None:
        self.turn_work, self.turn_s, self.turn_ends = 0.0, 0.0, 0

    def _neighbour(self) -> int:
        return self.chosen * 2 if self.up else self.chosen // 2

    def _is_clear(self) -> bool:
        chosen, other = self.rates[self.chosen], self.rates[self.other]
        is_apart = max(other) < min(chosen) or min(other) > max(chosen) * BETTER
        return len(chosen) == TURNS or (len(chosen) >= CLEAR_TURNS and is_apart)

    def _decide(self, now_s: float) -> None:
        assert self.started_s is not None
        trial_s, self.started_s = now_s - self.started_s, None
        ratio = median(self.rates[self.other]) / median(self.rates[self.chosen])
        if ratio > (BETTER if self.up else 1.0):
            self.chosen, self.hold_s = self.other, HOLD_S
            if 1 <= self._neighbour() <= self.most:
                return  # perhaps the next one is better still
        self.up = not self.up
        self.held_until_s = now_s + max(self.hold_s, min(HOLD_TRIALS * trial_s, MOST_HOLD_S))
        self.hold_s = min(2 * self.hold_s, MOST_HOLD_S)


@dataclass(frozen=True, eq=False)
class Started:
    """A piece of work that is under way.

    Attributes:
        level: How many were to be under way when it started.
    """

    level: int
    trial: _Trial | None


class Overlap:
    """Says how many pieces of work to have under way at once.

    Loads are told apart by powers of four, since what is best for many rows need not be so for few. A trial gives each
    of two neighbouring levels short turns, alternately, so that a load that drifts counts for both; the medians of
    their rates are compared. Only what ended while just so many were under way counts, and no time without work.

    Args:
        fixed: Always so many; 0 finds out.
        clock: Gives seconds that never go back.
    """

    def __init__(self, fixed: int = 0, clock: Callable[[], float] = lambda: time.monotonic()) -> None:
        self._fixed, self._clock = fixed, clock
        self._trials: dict[tuple[int, int], _Trial] = {}
        self._under_way: list[Started] = []
        self._since_s = 0.0
        self._latest = 1

    def level(self, load: int, most: int) -> int:
        """How many are to be under way.

        Args:
            load: How much work there is, under way or not.
            most: Into how many pieces it can be divided.
        """
        if self._fixed or most <= 1:
            return max(1, min(self._fixed or 1, most))
        return self._trial(load, most).level(self._clock())

    def started(self, load: int, most: int) -> Started:
        """A piece is under way."""
        if not self._under_way:
            self._since_s = self._clock()
        trial = None if self._fixed or most <= 1 else self._trial(load, most)
        started = Started(self.level(load, most), trial)
        self._under_way.append(started)
        return started

    def ended(self, started: Started, work: int) -> None:
        """A piece is over, and so much work was done by it; 0 if it failed."""
        now_s = self._clock()
        is_filled = all(one.level == len(self._under_way) for one in self._under_way)
        self._under_way.remove(started)
        if started.trial is not None and is_filled and work:
            started.trial.observe(started.level, work, now_s - self._since_s, now_s)
            self._latest = started.trial.chosen
        self._since_s = now_s

    def _trial(self, load: int, most: int) -> _Trial:
        most = 1 << (min(most, MOST_LEVEL).bit_length() - 1)
        key = load.bit_length() // 2, most
        if key not in self._trials:
            self._trials[key] = _Trial(most, min(self._latest, most))
        return self._trials[key]
