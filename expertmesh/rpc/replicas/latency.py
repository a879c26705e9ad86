"""How long calls of one service take: by method and size of the request, as seen lately."""

from __future__ import annotations

from math import inf, nan

WINDOW = 128  # samples that count
LEAST = 32  # samples that it takes to tell anything
EVERY = 16  # samples after which it is told anew
PATIENCE_S, PATIENCE_TIMES = 5.0, 50  # a reply that is later than both, in p95s, will not come


class Times:
    """What calls of one method with requests of about one size took.

    Attributes:
        p95_s: What 19 of 20 did not exceed; infinite before there are enough.
        median_s: What half of them did not exceed; NaN before there are enough.
        patience_s: How long one replica is waited for, whatever time the caller has.
    """

    __slots__ = ("_next", "_seen", "_took_s", "median_s", "p95_s", "patience_s")

    def __init__(self) -> None:
        self._took_s: list[float] = []
        self._next = self._seen = 0
        self.p95_s, self.median_s, self.patience_s = inf, nan, inf

    def add(self, took_s: float) -> None:
        """Takes down a call that was answered, or what it had waited when another replica answered in its place."""
        if len(self._took_s) < WINDOW:
            self._took_s.append(took_s)
        else:
            self._took_s[self._next] = took_s
            self._next = (self._next + 1) % WINDOW
        self._seen += 1
        if self._seen >= LEAST and self._seen % EVERY == 0:
            ordered = sorted(self._took_s)
            self.median_s = ordered[len(ordered) // 2]
            self.p95_s = ordered[len(ordered) * 95 // 100]
            self.patience_s = max(PATIENCE_S, PATIENCE_TIMES * self.p95_s)


class Latency:
    """The times of a service's calls; sizes that differ by less than two share an estimate."""

    def __init__(self) -> None:
        self._times: dict[tuple[str, int], Times] = {}

    def of(self, method: str, size: int) -> Times:
        """The times of requests like this one."""
        key = method, size.bit_length()
        times = self._times.get(key)
        if times is None:
            times = self._times[key] = Times()
        return times
