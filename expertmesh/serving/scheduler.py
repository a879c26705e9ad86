"""Continuous batching: sequences that generate share steps, each at the home of its KV cache.

A step takes one row of every sequence that decodes, and fills up with chunks of prompts; so a new request joins the
next step, and a long prompt does not stall those that run. What does not fit a home's cache waits, in order of arrival.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass

from expertmesh.errors import MeshError, NotFinite, Overloaded, Unavailable
from expertmesh.serving.generation import Generation, Token, Wish
from expertmesh.serving.home import Home, HomeLost
from expertmesh.serving.steps import Work, plan_step
from expertmesh.telemetry import metrics
from expertmesh.telemetry.logging import event

MAX_REBUILDS = 8
RETRY_OPEN_S = 0.05
KEEP_EVERY_S = 2.0  # a home forgets what it does not hear of


@dataclass(frozen=True)
class StepLimits:
    """How much is taken on.

    Attributes:
        rows: Most token rows in a step; a sequence that decodes has one.
        sequences: Most sequences that run at one home.
        waiting: Most sequences that wait; more are refused.
    """

    rows: int = 256
    sequences: int = 128
    waiting: int = 1024


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
        self._lanes: dict[int, _Lane] = {}

    async def generate(self, wish: Wish) -> AsyncGenerator[Token, None]:
        """The tokens of one sequence as they come; closing the iterator frees whatever it holds.

        Raises:
            Overloaded: Too much waits already.
            MeshError: It cannot be served.
        """
        if len(self._waiting) >= self._limits.waiting:
            raise Overloaded(f"{len(self._waiting)} sequences are waiting already")
        generation = Generation(wish)
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
            self.wake()

    def close(self) -> None:
        """Ends every lane, when the program ends."""
        for lane in self._lanes.values():
            lane.close()

    def take(self, lane: _Lane) -> Generation | None:
        """The next generation that waits, if it is this lane's turn: the emptiest lane takes it."""
        while self._waiting and self._waiting[0].left:
            self._waiting.popleft()
        if not self._waiting:
            return None
        emptier = [other for other in self._lanes.values() if other.load < lane.load and other.has_room]
        for other in emptier:
            other.wake()
        return None if emptier else self._waiting.popleft()

    def give_back(self, generations: Sequence[Generation]) -> None:
        """Puts generations back to the front of those that wait."""
        self._waiting.extendleft(reversed(generations))
        self.wake()

    def wake(self) -> None:
        """Looks again who waits and which homes are live; for whoever knows that something has changed."""
        live = [home for home in self._homes() if home.is_live]
        for home in live:
            if id(home) not in self._lanes:
                self._lanes[id(home)] = _Lane(home, self, self._limits)
        if not live:
            while self._waiting:
                self._waiting.popleft().fail(self._unavailable())
        self.tell()
        for lane in self._lanes.values():
            lane.wake()

    def tell(self) -> None:
        """Brings the metrics up to date."""
        metrics.GENERATIONS.labels("waiting").set(len(self._waiting))
        metrics.GENERATIONS.labels("running").set(sum(lane.load for lane in self._lanes.values()))


class _Lane:
    """The steps of one home, one after another."""

    def __init__(self, home: Home, scheduler: Scheduler, limits: StepLimits) -> None:
        self.home = home
        self._scheduler = scheduler
        self._limits = limits
        self._most = min(limits.sequences, limits.rows)  # each that runs has a row in every step
        self._running: list[Generation] = []
        self._awake = asyncio.Event()
        self._retry: asyncio.TimerHandle | None = None
        self.is_full = False  # until something is released or a while has passed
        context = contextvars.Context()  # not that of the request that happened to come first
        self._task = asyncio.get_running_loop().create_task(self._run(), context=context)

    @property
    def load(self) -> int:
        """Sequences that run here."""
        return len(self._running)

    @property
    def has_room(self) -> bool:
        """Whether it may take another one."""
        return not self.is_full and self.load < self._most and self.home.is_live

    def wake(self) -> None:
        """Lets it look again whether there is work."""
        self._awake.set()

    def close(self) -> None:
        """Ends it."""
        self._task.cancel()

    async def _run(self) -> None:
        while True:
            self._awake.clear()
            try:
                await self._release_left()
                await self._admit()
                self._scheduler.tell()
                if self._running:
                    await self._step()
                    continue
            except asyncio.CancelledError:
                raise
            except Exception as error:  # nobody may wait for a lane that ended
                event("internal_error", level=logging.ERROR, exc_info=True)
                await self._fail(Unavailable(f"a step failed: {type(error).__name__}", "gateway"))
            await self._awake.wait()

    async def _admit(self) -> None:
        while self.has_room:
            generation = self._scheduler.take(self)
            if generation is None:
                return
            try:
                await self.home.open(generation)
            except Overloaded:
                self._scheduler.give_back([generation])
                self._wait_for_room()
                return
            except HomeLost:
                self._lost([generation])
                return
            except MeshError as error:
                generation.fail(error)
            except Exception:
                generation.fail(Unavailable("it could not be started", "gating"))
                raise
            else:
                generation.heard_s = time.monotonic()
                self._running.append(generation)

    def _wait_for_room(self) -> None:
        """Nothing is opened until something was released here; another program may have, so look again anyway."""
        self.is_full = True
        self._retry = asyncio.get_running_loop().call_later(RETRY_OPEN_S, self._look_again)

    def _look_again(self) -> None:
        self.is_full = False
        self._retry = None
        self._scheduler.wake()

    async def _release_left(self) -> None:
        await self._release([generation for generation in self._running if generation.left])

    async def _release(self, generations: Sequence[Generation]) -> None:
        if not generations:
            return
        self._running = [generation for generation in self._running if generation not in generations]
        await self.home.release(generations)
        if self._retry is not None:
            self._retry.cancel()
            self._look_again()

    async def _step(self) -> None:
        work = plan_step(self._running, self._limits.rows)
        metrics.STEP_ROWS.observe(sum(piece.rows for piece in work))
        await self._keep({piece.generation for piece in work})
        await self._compute([piece for piece in work if piece.generation in self._running])

    async def _compute(self, work: Sequence[Work]) -> None:
        try:
            drawn, provenance = await self.home.step(work)
        except NotFinite as error:
            await self._one_by_one(work, error)
            return
        except HomeLost:
            lost, self._running = self._running, []
            await self.home.release(lost)
            self._lost(lost)
            return
        except MeshError as error:
            await self._fail(error)
            return
        tokens = iter(drawn)
        ended = []
        for piece in work:
            piece.generation.cached += piece.rows
            piece.generation.witnesses.add(provenance)
            if piece.draws and piece.generation.add(next(tokens), provenance.route):
                ended.append(piece.generation)
        await self._release(ended)

    async def _one_by_one(self, work: Sequence[Work], error: NotFinite) -> None:
        """Finds whose numbers are not finite, so that nobody else has to suffer for it; a step may be repeated."""
        if len(work) == 1:
            work[0].generation.fail(error)
            await self._release([work[0].generation])
            return
        for piece in work:
            if piece.generation in self._running:
                await self._compute([piece])

    async def _keep(self, heard: set[Generation]) -> None:
        """Speaks of sequences that have no part in the next step, lest they are forgotten."""
        now_s = time.monotonic()
        for generation in heard:
            generation.heard_s = now_s
        for generation in [one for one in self._running if now_s - one.heard_s > KEEP_EVERY_S]:
            generation.heard_s = now_s
            try:
                await self.home.open(generation)
            except MeshError:  # it was forgotten, and others have its room
                self._running.remove(generation)
                self._lost([generation])

    def _lost(self, generations: Sequence[Generation]) -> None:
        again = []
        for generation in generations:
            generation.restart()
            if generation.rebuilds > MAX_REBUILDS:
                generation.fail(Unavailable("its KV cache was lost again and again", "gating"))
            elif not generation.left:
                again.append(generation)
        self._scheduler.give_back(again)

    async def _fail(self, error: MeshError) -> None:
        failed = self._running
        for generation in failed:
            generation.fail(error)
        await self._release(failed)
