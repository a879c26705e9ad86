"""How long sequences take lately, once a home has taken them."""

from __future__ import annotations

import time

from expertmesh.serving.generation import Generation, Wish
from expertmesh.serving.shedding import Smoothed


class Durations:
    """Means of sequences that had all their tokens lately."""

    def __init__(self) -> None:
        self._first_s = Smoothed()
        self._next_s = Smoothed()
        self._tokens = Smoothed()
        self._whole_s = Smoothed()

    @property
    def whole_s(self) -> float | None:
        """How long a sequence takes; None if none was done yet."""
        return self._whole_s.value

    def alone_s(self, wish: Wish) -> float | None:
        """How long such a sequence will take; many end before they have all the tokens they may have."""
        if self._first_s.value is None or self._tokens.value is None:
            return None
        tokens = min(wish.max_tokens, self._tokens.value)
        return self._first_s.value + (tokens - 1) * (self._next_s.value or 0.0)

    def observe(self, generation: Generation) -> None:
        """Takes in a sequence that was done; one that was computed anew says nothing."""
        if generation.rebuilds or generation.known:
            return
        now_s = time.monotonic()
        self._whole_s.add(now_s - generation.opened_s)
        self._first_s.add(generation.first_s - generation.opened_s)
        self._tokens.add(generation.generated)
        if generation.generated > 1:
            self._next_s.add((now_s - generation.first_s) / (generation.generated - 1))

    def observe_late(self, generation: Generation) -> None:
        """Takes in what a sequence took until its deadline came, lest those that are too slow are never heard of."""
        if generation.rebuilds or generation.known or not generation.opened_s or self._whole_s.value is None:
            return
        took_s = time.monotonic() - generation.opened_s
        self._whole_s.add(max(took_s, self._whole_s.value))
        if not generation.generated:
            self._first_s.add(max(took_s, self._first_s.value or 0.0))
            return
        self._first_s.add(generation.first_s - generation.opened_s)
        if generation.generated > 1:
            self._next_s.add((took_s - (generation.first_s - generation.opened_s)) / (generation.generated - 1))
