"""Continuous batching: sequences that generate share steps, each at the home of its KV cache.

Those that wait are given to homes in the order of their arrival; who does not fit a home's cache goes on waiting. What
would be answered too late is refused. The steps of each home are a `lane`'s.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field

from expertmesh.errors import Unavailable
from expertmesh.serving import shedding
from expertmesh.serving.durations import Durations
from expertmesh.serving.generation import Generation, Token, Wish
from expertmesh.serving.home import Home
from expertmesh.serving.lane import Lane
from expertmesh.serving.rebuilds import RebuildLimits, Rebuilds
from expertmesh.telemetry import metrics


@dataclass(frozen=True)
class StepLimits:
    """How much is taken on.

    Attributes:
        rows: Most token rows in a step; a sequence that decodes has one.
        sequences: Most sequences that run at one home.
        waiting: Most sequences that wait; more are refused.
        micro_batches: Steps of one home that are under way at once, as long as there are sequences for them; 0 finds
            out how many are best.
        rebuilds: How much is computed anew.
    """

    rows: int = 256
    sequences: int = 128
    waiting: int = 1024
    micro_batches: int = 0
    rebuilds: RebuildLimits = field(default_factory=RebuildLimits)


class Scheduler:
    """Runs generations at homes that may come and go.

    Args:
        homes: Gives the homes there are.
        limits: How much is taken on.
        unavailable: The error that says that there is no live home.
    """

    def __init__(
        self, homes: Callable[[], Sequence[Home]], limits: StepLimits, unavailable: Callable[[], Unavailable]
    ) -> None:
        self._homes, self._limits, self._unavailable = homes, limits, unavailable
        self._waiting: deque[Generation] = deque()
        self._rebuilds = Rebuilds(limits.rebuilds, self.wake)
        self._lanes: dict[int, Lane] = {}
        self.durations = Durations()
        self._counted: dict[str, int] = {}

    async def generate(self, wish: Wish, known: Sequence[int] = ()) -> AsyncGenerator[Token, None]:
        """The tokens of one sequence as they come; closing the iterator frees whatever it holds.

        Args:
            wish: What is asked.
            known: What was generated of it elsewhere; it goes on behind that, once all is computed anew.

        Raises:
            Overloaded: Too much waits already, or so much that it would not be done in time.
            MeshError: It cannot be served.
        """
        self.durations.wished(wish)
        expected_s = self._expected_s(wish)
        if len(self._waiting) >= self._limits.waiting:
            raise shedding.refuse_full("step", f"{len(self._waiting)} sequences", expected_s)
        if expected_s is not None and not known:  # somebody has seen a part of it
            shedding.refuse_late("step", expected_s, wish.deadline)
        generation = Generation(wish, known)
        if known:
            self._rebuilds.add([generation])
        else:
            self._waiting.append(generation)
        tokens = generation.tokens()
        try:
            self.wake()
            async for token in tokens:
                yield token
        finally:
            await tokens.aclose()
            if generation in self._waiting:
                self._waiting.remove(generation)
            self._rebuilds.discard(generation)
            if time.monotonic() >= wish.deadline.at_s:
                self.durations.late(generation)
            self.wake()

    def close(self) -> None:
        """Ends every lane, when the program ends."""
        self._rebuilds.close()
        self._count(dict.fromkeys(self._counted, 0))
        for lane in self._lanes.values():
            lane.close()

    def take(self, lane: Lane) -> Generation | None:
        """The next generation that waits, if it is this lane's turn: the emptiest lane takes it."""
        while self._waiting and (self._waiting[0].left or self._is_dropped(self._waiting[0], lane.load + 1)):
            self._waiting.popleft()
        if not self._waiting or not (self._waiting[0].generated or lane.bearable):
            return None
        emptier = [other for other in self._lanes.values() if other.load < lane.load and other.has_room]
        for other in emptier:
            other.wake()
        return None if emptier else self._waiting.popleft()

    def room_elsewhere(self, lane: Lane) -> int:
        """How many sequences of a lane others probably have room for, beside those that have none."""
        room = sum(other.room for other in self._lanes.values() if other is not lane)
        return max(0, room - len(self._waiting) - len(self._rebuilds))

    def may_rebuild(self, generation: Generation) -> bool:
        """Whether a sequence is not too long to be computed anew."""
        return self._rebuilds.takes(generation)

    def give_back(self, generations: Sequence[Generation]) -> None:
        """Puts generations back to the front of those that wait."""
        self._waiting.extendleft(reversed(generations))
        self.wake()

    def rebuild(self, generations: Sequence[Generation], is_loss: bool = True) -> None:
        """Takes sequences on whose cache is lost, or is left since its home leaves."""
        for generation in generations:
            generation.restart(is_loss)
        self._rebuilds.add([one for one in generations if not one.left])
        self.wake()

    def wake(self) -> None:
        """Looks again who waits and which homes are live; for whoever knows that something has changed."""
        homes = self._homes()
        live = [home for home in homes if home.is_live]
        known = {id(home) for home in homes}
        for key in [key for key, lane in self._lanes.items() if key not in known and lane.is_empty]:
            self._lanes.pop(key).close()  # its home has left
        for home in live:
            if id(home) not in self._lanes:
                self._lanes[id(home)] = Lane(home, self, self._limits)
        if not live:
            while self._waiting:
                self._waiting.popleft().fail(self._unavailable())
            self._rebuilds.fail(self._unavailable)
        elif self._rebuilds:
            self._waiting.extendleft(reversed(self._rebuilds.due()))
        self.tell()
        for lane in self._lanes.values():
            lane.wake()

    def _expected_s(self, wish: Wish) -> float | None:
        """How long a new sequence would take, if that is known and there is no room for it now."""
        room = sum(min(lane.room, lane.bearable) for lane in self._lanes.values())
        before = len(self._waiting) + 1 - room
        if before <= 0 or not self._lanes:
            return None
        running = sum(lane.load for lane in self._lanes.values())
        # each that ends makes room for one
        return self.durations.expected_s(wish, before / max(1, running), 1 + running // len(self._lanes))

    def _is_dropped(self, generation: Generation, running: int) -> bool:
        """Drops what would come too late, unless nobody else waits, or somebody has seen a part of it."""
        wish = generation.wish
        if generation.generated or len(self._waiting) == 1 or not self.durations.is_hopeless(wish, running):
            return False
        generation.fail(shedding.dropped("step", self._expected_s(wish) or self.durations.own_s(wish, running) or 0.0))
        return True

    def tell(self) -> None:
        """Brings the metrics up to date, to which other schedulers of the process add theirs."""
        running = sum(lane.load for lane in self._lanes.values())
        self._count({"running": running, "waiting": len(self._waiting), "rebuilding": len(self._rebuilds)})

    def _count(self, state2count: dict[str, int]) -> None:
        for state, count in state2count.items():
            if more := count - self._counted.get(state, 0):
                metrics.GENERATIONS.labels(state).inc(more)
        self._counted = state2count
