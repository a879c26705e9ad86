"""The steps of one home: several under way at once, each with sequences of its own.

A step takes a row of every sequence that decodes, and fills up with chunks of prompts; so a new request joins the next
step, and a long prompt does not stall those that run. While one step is with the experts another may be in attention;
`overlap` says how many are best. A sequence is in one step at most. Steps only compute: whatever follows of them is
done by the lane's own task, one after another.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertmesh.errors import MeshError, NotFinite, Overloaded, Unavailable
from expertmesh.serving.generation import Generation
from expertmesh.serving.home import Home, HomeLost
from expertmesh.serving.overlap import MOST_LEVEL, Overlap, Started
from expertmesh.serving.passes import Provenance
from expertmesh.serving.room import Room
from expertmesh.serving.steps import Work, plan_share
from expertmesh.telemetry import metrics
from expertmesh.telemetry.logging import event
from expertmesh.v1.sampling_pb2 import TokenLogprobs

if TYPE_CHECKING:
    from expertmesh.serving.scheduler import Scheduler, StepLimits

KEEP_EVERY_S = 2.0  # a home forgets what it does not hear of

_StepTask = asyncio.Task[tuple[list[TokenLogprobs], Sequence[Provenance]]]


@dataclass(frozen=True, eq=False)
class _Step:
    """What is computed under way."""

    work: Sequence[Work]
    started: Started


class Lane:
    """Runs sequences at one home.

    Args:
        home: Where their caches are.
        scheduler: Has those that wait.
        limits: How much is taken on.
    """

    def __init__(self, home: Home, scheduler: Scheduler, limits: StepLimits) -> None:
        self.home = home
        self._scheduler = scheduler
        self._limits = limits
        self._most = min(limits.sequences, limits.rows * (limits.micro_batches or MOST_LEVEL))
        self._running: list[Generation] = []
        self._opening: Generation | None = None
        self._busy: set[Generation] = set()  # those in a step that is under way, or to be computed apart
        self._apart: deque[list[Work]] = deque()  # among each there is one of which nothing finite comes
        self._under_way: dict[_StepTask, _Step] = {}
        self._overlap = Overlap(limits.micro_batches)
        self._steps = 0
        self._releases: set[asyncio.Task[None]] = set()
        self._awake = asyncio.Event()
        self._room = Room(self._most, lambda: self.load, scheduler.wake)
        self._context = contextvars.Context()  # not that of the request that happened to come first
        self._task = asyncio.get_running_loop().create_task(self._run(), context=self._context)

    @property
    def load(self) -> int:
        """Sequences that run here."""
        return len(self._running)

    @property
    def is_empty(self) -> bool:
        """Whether no sequence runs here, or is about to."""
        return not self._running and self._opening is None

    @property
    def has_room(self) -> bool:
        """Whether it may take another one."""
        return not self._room.is_full and self.load < self._most and self.home.is_live

    @property
    def room(self) -> int:
        """How many more it probably has room for."""
        return self._room.left if self.home.is_live else 0

    @property
    def bearable(self) -> int:
        """How many more it may take, room or not, without making anybody late."""
        return max(0, int(min(self._most, self._scheduler.durations.most_running(self._running)) - self.load))

    def wake(self) -> None:
        """Lets it look again whether there is work."""
        self._awake.set()

    def close(self) -> None:
        """Ends it."""
        for task in (self._task, *self._under_way):
            task.cancel()

    async def _run(self) -> None:
        while True:
            self._awake.clear()
            try:
                await self._collect()
                self._release([one for one in self._running if one.left and one not in self._busy])
                self._move()
                self._start()
                await self._admit()
                await self._keep()
                self._start()
            except asyncio.CancelledError:
                raise
            except Exception as error:  # nobody may wait for a lane that ended
                event("internal_error", level=logging.ERROR, exc_info=True)
                await self._stop_steps()
                self._fail(self._running, Unavailable(f"a step failed: {type(error).__name__}", "gateway"))
            self._scheduler.tell()
            await self._awake.wait()

    async def _admit(self) -> None:
        while self.has_room:
            generation = self._opening = self._scheduler.take(self)
            if generation is None:
                return
            try:
                await self.home.open(generation)
            except Overloaded:
                self._scheduler.give_back([generation])
                self._room.refused()
                return
            except HomeLost:
                self._scheduler.rebuild([generation])
                return
            except MeshError as error:
                generation.fail(error)
            except Exception:
                generation.fail(Unavailable("it could not be started", "gating"))
                raise
            else:
                generation.opened_s = generation.heard_s = time.monotonic()
                generation.stepped = 0
                self._running.append(generation)
                self._room.taken()
            finally:
                self._opening = None
            if self._steps_ended():  # those that run already do not wait until everybody has come in
                await self._collect()
                self._start()

    def _move(self) -> None:
        """Hands sequences of a home that leaves to others that have room for them, where they are computed anew."""
        if not self.home.is_leaving:
            return
        room = self._scheduler.room_elsewhere(self)
        idle = [one for one in self._running if one not in self._busy and not one.left]
        moving = [one for one in idle if self._scheduler.may_rebuild(one)][:room]
        if moving:
            self._release(moving)
            self._scheduler.rebuild(moving, is_loss=False)

    def _release(self, generations: Sequence[Generation]) -> None:
        """Frees sequences, for which no step waits."""
        if not generations:
            return
        gone = set(generations)
        self._running = [one for one in self._running if one not in gone]
        task = asyncio.get_running_loop().create_task(self._free(generations), context=self._context)
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)

    async def _free(self, generations: Sequence[Generation]) -> None:
        await self.home.release(generations)
        self._room.released()

    def _start(self) -> None:
        """Starts steps, as many as are to be under way."""
        while self._running:
            missing = sum(one.missing for one in self._running)
            load, most = min(missing, self._limits.rows), len(self._running)
            steps = self._overlap.level(load, most)
            if len(self._under_way) >= steps:
                return
            work = self._next_apart() or self._next_shared(missing, steps)
            if not work:
                return
            self._start_step(work, self._overlap.started(load, most))

    def _next_apart(self) -> list[Work]:
        work: list[Work] = []
        while self._apart and not work:
            pieces = self._apart.popleft()
            work = [piece for piece in pieces if not piece.generation.left]
            self._busy.difference_update(piece.generation for piece in pieces if piece.generation.left)
        return work

    def _next_shared(self, missing: int, steps: int) -> list[Work]:
        idle = [one for one in self._running if one not in self._busy and not one.left]
        return plan_share(idle, len(self._running), missing, steps, self._limits.rows) if idle else []

    def _start_step(self, work: Sequence[Work], started: Started) -> None:
        now_s = time.monotonic()
        self._steps += 1
        for piece in work:
            piece.generation.heard_s, piece.generation.stepped = now_s, self._steps
            self._busy.add(piece.generation)
        metrics.STEP_ROWS.observe(sum(piece.rows for piece in work))
        metrics.UNDER_WAY.labels("step").inc()
        task: _StepTask = asyncio.get_running_loop().create_task(self.home.step(work), context=self._context.copy())  # type: ignore[arg-type]
        self._under_way[task] = _Step(work, started)
        task.add_done_callback(lambda _: self.wake())

    def _steps_ended(self) -> list[_StepTask]:
        return [task for task in self._under_way if task.done()]

    async def _collect(self) -> None:
        """Takes in what came of steps."""
        while ended := self._steps_ended():
            step = self._over(ended[0])
            try:
                drawn, hows = ended[0].result()
            except NotFinite as error:
                self._overlap.ended(step.started, 0)
                self._divide(step.work, error)
            except HomeLost:
                self._overlap.ended(step.started, 0)
                await self._lose_home()
            except (MeshError, Exception) as error:
                self._overlap.ended(step.started, 0)
                if not isinstance(error, MeshError):
                    event("internal_error", level=logging.ERROR, exc_info=True)
                    error = Unavailable(f"a step failed: {type(error).__name__}", "gateway")
                self._fail([piece.generation for piece in step.work], error)
            else:
                self._overlap.ended(step.started, sum(piece.rows for piece in step.work))
                self._take_in(step.work, drawn, hows)

    def _over(self, task: _StepTask) -> _Step:
        metrics.UNDER_WAY.labels("step").dec()
        step = self._under_way.pop(task)
        self._busy.difference_update(piece.generation for piece in step.work)
        return step

    def _take_in(self, work: Sequence[Work], drawn: Sequence[TokenLogprobs], hows: Sequence[Provenance]) -> None:
        tokens = iter(drawn)
        ended = []
        self._scheduler.durations.stepped(self.load, [piece.generation for piece in work if piece.rows == 1])
        for piece, provenance in zip(work, hows, strict=True):
            piece.generation.cached += piece.rows
            piece.generation.witnesses.add(provenance)
            if piece.draws and piece.generation.add(next(tokens), provenance.route):
                ended.append(piece.generation)
                self._scheduler.durations.ended(piece.generation)
        self._release(ended)

    def _divide(self, work: Sequence[Work], error: NotFinite) -> None:
        """Finds whose numbers are not finite, so that nobody else has to suffer for it; a step may be repeated."""
        if len(work) == 1:
            self._fail([work[0].generation], error)
            return
        self._busy.update(piece.generation for piece in work)
        self._apart += [list(work[: len(work) // 2]), list(work[len(work) // 2 :])]

    async def _keep(self) -> None:
        """Speaks of sequences that have no part in a step, lest they are forgotten."""
        now_s = time.monotonic()
        silent = [one for one in self._running if one not in self._busy and now_s - one.heard_s > KEEP_EVERY_S]
        for generation in silent:
            generation.heard_s = now_s
            try:
                await self.home.open(generation)
            except HomeLost:
                await self._lose_home()
                return
            except MeshError:  # it was forgotten, and others have its room
                self._running.remove(generation)
                self._scheduler.rebuild([generation])

    async def _stop_steps(self) -> None:
        """Nobody waits for what is under way any more."""
        tasks = list(self._under_way)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in tasks:
            self._overlap.ended(self._over(task).started, 0)
        self._apart.clear()
        self._busy.clear()

    async def _lose_home(self) -> None:
        """Everything here has to be computed anew; steps that are still under way are of no use."""
        await self._stop_steps()
        await self.home.release(self._running)  # they count as running meanwhile, or this lane could be closed
        lost, self._running = self._running, []
        self._scheduler.rebuild(lost)

    def _fail(self, generations: Sequence[Generation], error: MeshError) -> None:
        for generation in generations:
            generation.fail(error)
        self._release(generations)
