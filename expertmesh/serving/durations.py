"""How long sequences take lately, once a home has taken them, and how many may run so that they are done in time.

The time between two tokens of a sequence grows with the sequences that run at its home, so a home that takes all that
it has room for may be late with every one of them. How many tokens a sequence will have is not known, for many end
before they have all that they may: it is taken from those that might have about as many.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

from expertmesh.serving.generation import Generation, Wish
from expertmesh.serving.line import Line
from expertmesh.serving.shedding import Quantile, Smoothed, bearable_s

STEP_FADES = 0.98  # of its weight a step keeps when the next one comes in
LONG_SHARE = 0.9  # of those that are asked for, as many are no longer than what is called long
LONG_RUN = 0.5  # of what callers usually can bear is enough for a long sequence, if no more run than should
LONG_PLACE = 0.75  # of what a caller can bear is left for running, as a long one would need, however short its own is
GROWTH = 2.0  # times as many may run as did lately, though it is not known how steps would be


class Durations:
    """Means of what was seen lately."""

    def __init__(self) -> None:
        self._first_s = Smoothed()
        self._whole_s = Smoothed()
        self._next_s = Line(STEP_FADES)  # by the sequences that run
        self._tokens: defaultdict[int, Smoothed] = defaultdict(Smoothed)  # by powers of two of the most there may be
        self._long_tokens = Quantile(LONG_SHARE)
        self._bearable_s = Smoothed()

    def wished(self, wish: Wish) -> None:
        """Takes in what is asked, whether it is taken on or not."""
        self._long_tokens.add(self._tokens_of(wish))
        self._bearable_s.add(bearable_s(wish.deadline))

    def stepped(self, running: int, decoding: Sequence[Generation]) -> None:
        """Takes in a step that ended, where so many ran: how long those that have another token now waited for it."""
        latest_s = [generation.latest_s for generation in decoding if generation.latest_s]
        if latest_s:
            self._next_s.add(running, time.monotonic() - sum(latest_s) / len(latest_s))

    def ended(self, generation: Generation) -> None:
        """Takes in a sequence that was done; one that was computed anew says nothing."""
        if generation.rebuilds or generation.known:
            return
        self._whole_s.add(time.monotonic() - generation.opened_s)
        self._first_s.add(generation.first_s - generation.opened_s)
        self._tokens[generation.wish.max_tokens.bit_length()].add(generation.generated)

    def late(self, generation: Generation) -> None:
        """Takes in what a sequence took until its deadline came, lest those that are too slow are never heard of."""
        if generation.rebuilds or generation.known or not generation.opened_s or self._whole_s.value is None:
            return
        took_s = time.monotonic() - generation.opened_s
        self._whole_s.add(max(took_s, self._whole_s.value))
        if generation.generated:
            self._first_s.add(generation.first_s - generation.opened_s)
        else:
            self._first_s.add(max(took_s, self._first_s.value or 0.0))

    def own_s(self, wish: Wish, running: int) -> float | None:
        """How long a sequence will take where so many run, itself included; None if nothing is known."""
        return self._own_s(self._tokens_of(wish), running)

    def expected_s(self, wish: Wish, before: float, running: int) -> float | None:
        """How long a sequence will take that so many have to make room for first; None if nothing is known.

        It is taken for a long one, within limits. So in a flood, where there is never much time left after waiting,
        short ones are not admitted before others.
        """
        own_s = self.own_s(wish, running)
        if own_s is None or self._whole_s.value is None:
            return None
        long_s = self._own_s(self._long_tokens.value or 1.0, running) or 0.0
        long_s = min(long_s, LONG_PLACE * bearable_s(wish.deadline))
        return before * self._whole_s.value + max(own_s, long_s)

    def is_hopeless(self, wish: Wish, running: int) -> bool:
        """Whether a sequence is likely to come too late if it starts now, so that so many run."""
        own_s = self.own_s(wish, running)
        return own_s is not None and bearable_s(wish.deadline) < own_s

    def most_running(self, running: Sequence[Generation]) -> float:
        """How many may run where these do, so that those among them that are not too late already are done in time.

        And so that long ones could be that came now: as long as steps do not cost as much as all that is in them.
        """
        line = self._next_s
        if not line.is_known:
            return float("inf")
        long_s = LONG_RUN * (self._bearable_s.value or 0.0) - (self._first_s.value or 0.0)
        next_s = long_s / (self._long_tokens.value or 1.0)
        # whatever the line says: if steps took as much longer as more ran, or else some more, so that it is learnt
        most = line.mean_size * max(next_s / line.mean_s, GROWTH)
        if line.unit_s:
            most = min(most, max(next_s - line.always_s, line.always_s) / line.unit_s)
            beside = (self._most_beside(generation) for generation in running)
            most = min(most, min((one for one in beside if one >= len(running)), default=most))
        return max(1.0, most)

    def _most_beside(self, generation: Generation) -> float:
        tokens = self._tokens_of(generation.wish) - generation.generated
        if tokens <= 0:
            return float("inf")
        return (bearable_s(generation.wish.deadline) / tokens - self._next_s.always_s) / self._next_s.unit_s

    def _own_s(self, tokens: float, running: int) -> float | None:
        if self._first_s.value is None:
            return None
        return self._first_s.value + (tokens - 1) * (self._next_s.at(running) if self._next_s.is_known else 0.0)

    def _tokens_of(self, wish: Wish) -> float:
        return min(wish.max_tokens, self._tokens[wish.max_tokens.bit_length()].value or wish.max_tokens)
