"""A straight line through what was measured lately."""

from __future__ import annotations

FADES = 0.9  # of its weight a point keeps when the next one comes in
LEAST_SPREAD = 0.01  # variance of sizes by the square of their mean, below which nothing is known of what size adds


class Line:
    """Seconds by size: what is always needed, and what each unit of size adds.

    Newer points count more (weighted least squares). As long as all were of about one size, size is taken to add
    nothing; neither number is ever below zero.

    Args:
        fades: Of its weight a point keeps so much when the next one comes in.

    Attributes:
        is_known: Whether there was any point.
        mean_size: Of the points, as is everything else; 0 before the first.
        mean_s: Their seconds.
        is_spread: Whether sizes differed enough.
        always_s: What is needed whatever the size.
        unit_s: What each unit of size adds.
    """

    def __init__(self, fades: float = FADES) -> None:
        self._fades = fades
        self._weight = self._sizes = self._seconds = self._squares = self._products = 0.0
        self.is_known = self.is_spread = False
        self.mean_size = self.mean_s = self.always_s = self.unit_s = 0.0

    def add(self, size: float, seconds: float) -> None:
        """Takes in a point."""
        self._weight = self._fades * self._weight + 1
        self._sizes = self._fades * self._sizes + size
        self._seconds = self._fades * self._seconds + seconds
        self._squares = self._fades * self._squares + size * size
        self._products = self._fades * self._products + size * seconds
        self._fit()

    def at(self, size: float) -> float:
        """Seconds of such a size."""
        return self.always_s + self.unit_s * size

    def slowed(self, times: float) -> Line:
        """The same points, as if all had taken so many times as long; together they weigh no more than one."""
        other, share = Line(self._fades), 1 / max(1.0, self._weight)
        other._weight, other._sizes, other._squares = share * self._weight, share * self._sizes, share * self._squares
        other._seconds, other._products = share * times * self._seconds, share * times * self._products
        if self.is_known:
            other._fit()
        return other

    def _fit(self) -> None:
        self.is_known = True
        self.mean_size, self.mean_s = self._sizes / self._weight, self._seconds / self._weight
        variance = self._squares / self._weight - self.mean_size**2
        self.is_spread = variance >= LEAST_SPREAD * self.mean_size**2
        slope = (self._products / self._weight - self.mean_size * self.mean_s) / variance if self.is_spread else 0.0
        self.unit_s = min(max(slope, 0.0), self.mean_s / self.mean_size)
        self.always_s = self.mean_s - self.unit_s * self.mean_size
