"""How long passes take, by the number of their texts: what every pass costs, and what each text adds.

Both come of the passes of lately, the newer ones counting more (weighted least squares over a straight line). As long
as all were of one size, a text is taken to add nothing, and passes grow step by step where deadlines are near.
"""

from __future__ import annotations

import time
from math import ceil

from expertmesh.rpc.deadline import Deadline
from expertmesh.serving.shedding import PATIENCE

FADES = 0.9  # of its weight a pass keeps when the next one comes in
MOST_TEXTS = 2**31
LEAST_SPREAD = 0.25  # variance of sizes, in texts squared, below which nothing is known of what a text adds


class PassTimes:
    """The passes of lately."""

    def __init__(self) -> None:
        self._weight = self._texts = self._seconds = self._squares = self._products = 0.0

    @property
    def are_known(self) -> bool:
        """Whether there was a pass at all."""
        return self._weight > 0

    def add(self, texts: int, seconds: float) -> None:
        """Takes in a pass that was answered."""
        self._weight = FADES * self._weight + 1
        self._texts = FADES * self._texts + texts
        self._seconds = FADES * self._seconds + seconds
        self._squares = FADES * self._squares + texts * texts
        self._products = FADES * self._products + texts * seconds

    def add_lost(self, texts: int, seconds: float) -> None:
        """Takes in a pass that was ended before it was answered, if it had taken longer than others by then."""
        if not self.are_known or seconds > self.of(texts):
            self.add(texts, seconds)

    def of(self, texts: float) -> float:
        """Seconds that a pass of so many texts takes; only once some are known."""
        pass_s, text_s = self._line()
        return pass_s + text_s * texts

    def left_s(self, texts: int, started_s: float) -> float:
        """Seconds that a pass will still be under way."""
        return max(0.0, self.of(texts) - (time.monotonic() - started_s))

    def is_hopeless(self, deadline: Deadline) -> bool:
        """Whether a pass that starts now, if it is no more than one text, is likely to come too late."""
        return self.are_known and deadline.at_s - time.monotonic() < self.of(1)

    def most_texts(self, deadline: Deadline) -> int:
        """Texts of the largest pass that is done in time if it starts now.

        It is never smaller than one in which the texts cost as much as the pass itself: below that, keeping to one
        deadline would take too much from everybody else.
        """
        if not self.are_known:
            return MOST_TEXTS
        seconds = PATIENCE * (deadline.at_s - time.monotonic())
        pass_s, text_s = self._line()
        if self._spread < LEAST_SPREAD:  # if every text took its share, or else twice as many: so that is learnt
            return max(2 * ceil(self._texts / self._weight), int(seconds * self._texts / self._seconds))
        if text_s <= 0:
            return MOST_TEXTS
        return max(1, int(max(seconds - pass_s, pass_s) / text_s))

    @property
    def _spread(self) -> float:
        return self._squares / self._weight - (self._texts / self._weight) ** 2

    def _line(self) -> tuple[float, float]:
        """Seconds of every pass, and of each text in it."""
        mean_texts, mean_s = self._texts / self._weight, self._seconds / self._weight
        if self._spread < LEAST_SPREAD:
            return mean_s, 0.0
        text_s = max(0.0, (self._products / self._weight - mean_texts * mean_s) / self._spread)
        text_s = min(text_s, mean_s / mean_texts)
        return mean_s - text_s * mean_texts, text_s
