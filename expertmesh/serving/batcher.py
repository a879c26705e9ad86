"""Calls that wait together share a pass through the layers.

A pass starts as soon as there is room for one, or a moment later where those that were just answered are about to come
back (`returns`); what arrives meanwhile waits (`waiting`) and shares the next. Calls take turns, so that one with a
thousand texts does not hold up one with a single text; and the oldest has a turn in every pass, so that it is not held
up for ever by those that come. What would be answered too late, as passes of lately tell (`pass_times`), is refused.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic, TypeVar

from expertmesh.errors import DeadlineExceeded, InvalidInput, MeshError
from expertmesh.rpc.deadline import Deadline
from expertmesh.serving import shedding
from expertmesh.serving.overlap import MOST_LEVEL, Overlap, Started
from expertmesh.serving.pass_times import MOST_SIZE, PassTimes
from expertmesh.serving.returns import Returns
from expertmesh.serving.waiting import Call, Waiting
from expertmesh.telemetry import metrics, tracing

WorkT = TypeVar("WorkT")
AnswerT = TypeVar("AnswerT")

TURN = 16  # texts that one call may put into a pass before the next call's turn


@dataclass(frozen=True)
class Limits:
    """How much is taken on.

    Attributes:
        pass_texts: Most texts in a pass.
        pass_characters: Most characters in a pass that has more than one text.
        passes: Most passes under way at once; 0 finds out how many are best.
        waiting_texts: Most texts that wait; more are refused.
        waiting_characters: Most characters that wait; more are refused.
        sheds: Whether calls are refused that would be answered too late.
    """

    pass_texts: int = 64
    pass_characters: int = 2**17
    passes: int = 1
    waiting_texts: int = 8192
    waiting_characters: int = 2**26
    sheds: bool = True


@dataclass(eq=False)
class _Pass(Generic[WorkT, AnswerT]):
    """A pass, whose texts are in it, and how many of its calls ended before it did."""

    started: Started
    started_s: float
    taken: list[tuple[Call[WorkT, AnswerT], int]] = field(default_factory=list)
    characters: int = 0
    is_answered: bool = False
    left: int = 0

    @property
    def size(self) -> int:
        """As that of what waits."""
        return len(self.taken) + self.characters

    @cached_property
    def calls(self) -> Sequence[Call[WorkT, AnswerT]]:
        """Once all are taken."""
        return list(dict.fromkeys(call for call, _ in self.taken))


class Batcher(Generic[WorkT, AnswerT]):
    """Runs work in shared passes.

    Args:
        run_pass: Answers a list of work by a list of answers, each of them an answer or the error of that one text;
            the second argument is the latest deadline among the callers.
        limits: How much is taken on.
        weigh: Characters of a text.
    """

    def __init__(
        self,
        run_pass: Callable[[list[WorkT], Deadline], Awaitable[Sequence[AnswerT | MeshError]]],
        limits: Limits = Limits(),
        weigh: Callable[[WorkT], int] = lambda work: 0,
    ) -> None:
        self._run_pass = run_pass
        self._limits = limits
        self._weigh = weigh
        self._waiting: Waiting[WorkT, AnswerT] = Waiting(weigh)
        self._texts_under_way = 0
        self._is_starting = False
        self._overlap = Overlap(limits.passes)
        self._pass_times = PassTimes()
        self._returns = Returns()
        self._timer: asyncio.TimerHandle | None = None
        self._passes: dict[asyncio.Task[None], _Pass[WorkT, AnswerT]] = {}

    async def submit(self, work: Sequence[WorkT], deadline: Deadline) -> list[AnswerT]:
        """Answers one call's work, in its order.

        Raises:
            Overloaded: Too much waits already, or so much that it would not be done in time.
            DeadlineExceeded: It was not done in time.
            MeshError: One of its texts, or a pass it was in, failed.
        """
        if not work:
            return []
        characters = sum(map(self._weigh, work))
        left_s = deadline.remaining_s()
        self._check_room(len(work), characters, deadline)
        loop = asyncio.get_running_loop()
        call: Call[WorkT, AnswerT] = Call(
            work,
            deadline,
            [None] * len(work),
            loop.create_future(),
            contextvars.copy_context(),
            tracing.current(),
            time.monotonic(),
            missing=len(work),
        )
        self._waiting.add(call, characters)
        self._returns.came()
        if not self._is_starting:  # when all that arrived at the same time are here
            self._is_starting = True
            loop.call_soon(self._start_passes)
        timer = loop.call_later(left_s, call.fail, DeadlineExceeded("the deadline has passed"))
        try:
            await call.done
        finally:
            timer.cancel()
            self._leave(call)
        return call.answers  # type: ignore[return-value]

    def _check_room(self, texts: int, characters: int, deadline: Deadline) -> None:
        texts_fit = self._waiting.texts + texts <= self._limits.waiting_texts
        if not texts_fit or self._waiting.characters + characters > self._limits.waiting_characters:
            waiting = f"{self._waiting.texts} texts"
            raise shedding.refuse_full("pass", waiting, self._expected_s(texts, characters))
        if self._limits.sheds and (expected_s := self._expected_s(texts, characters)) is not None:
            shedding.refuse_late("pass", expected_s, deadline)

    def _expected_s(self, texts: int, characters: int) -> float | None:
        """How long a new call would take, if that is known and anything waits.

        Its own pass takes as long as they usually do, however small the call is, since others will share it. So in a
        flood, where there is never room for much, small calls are not admitted before others.
        """
        level = self._level()
        times = self._pass_times.at(level)
        if not times.are_known or not self._waiting:
            return None

        def taken(texts: float, characters: float, size: float) -> tuple[float, float]:
            """Passes, and the seconds of all of them one after another."""
            passes = max(1.0, texts / self._limits.pass_texts, characters / self._limits.pass_characters)
            return passes, passes * times.of(size / passes)

        turns = -(-texts // TURN)
        before = min(1.0, turns * TURN * len(self._waiting) / self._waiting.texts)  # share of what waits
        more_texts, more_characters = before * self._waiting.texts, before * self._waiting.characters
        size = max(texts + characters, times.usual_size)
        passes, own_s = taken(texts, characters, size)
        _, all_s = taken(texts + more_texts, characters + more_characters, size + more_texts + more_characters)
        under_way = self._passes.values()
        left_s = sum(self._pass_times.at(one.started.level).left_s(one.size, one.started_s) for one in under_way)
        return left_s / max(1, len(under_way)) + (all_s - own_s) / level + own_s / min(passes, level)

    def _level(self) -> int:
        return self._overlap.level(*self._load())

    def _load(self) -> tuple[int, int]:
        texts = self._waiting.texts + self._texts_under_way
        return min(texts, MOST_LEVEL * self._limits.pass_texts), texts

    def _start_passes(self) -> None:
        self._is_starting = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        is_full = self._waiting.texts >= self._limits.pass_texts
        if self._waiting and not is_full and (wait_s := self._returns.wait_s()):
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._start_passes)
            return
        while self._waiting and len(self._passes) < self._level():
            one = self._take(self._overlap.started(*self._load()))
            task = asyncio.get_running_loop().create_task(self._pass(one), context=one.calls[0].context.copy())
            self._passes[task] = one
            self._texts_under_way += len(one.taken)
            metrics.UNDER_WAY.labels("pass").inc()
            for call in one.calls:
                call.passes.add(task)
            task.add_done_callback(self._pass_ended)

    def _take(self, started: Started) -> _Pass[WorkT, AnswerT]:
        """Takes texts for a pass from each waiting call in turn; as many are left for each of the other passes."""
        times = self._pass_times.at(started.level)
        one: _Pass[WorkT, AnswerT] = _Pass(started, time.monotonic())
        most_texts, most_size = min(-(-self._load()[1] // started.level), self._limits.pass_texts), MOST_SIZE
        self._waiting.prefer_oldest()
        while self._waiting and len(one.taken) < most_texts:
            call = self._waiting.next
            if self._limits.sheds:
                least, is_alone = one.size + 1 + self._waiting.weight(call), not one.taken and len(self._waiting) == 1
                if not is_alone and times.is_hopeless(call.deadline, least, one.size + self._waiting.size):
                    self._drop(call, times.of(least))
                    continue
                most_size = min(most_size, times.most(call.deadline))
            for _ in range(min(TURN, most_texts - len(one.taken), len(call.work) - call.taken)):
                weight = self._waiting.weight(call)
                is_full = one.characters + weight > self._limits.pass_characters or one.size + 1 + weight > most_size
                if one.taken and is_full:
                    return one
                one.taken.append((call, self._waiting.take(call)))
                one.characters += weight
            self._waiting.end_turn(call)
        return one

    def _drop(self, call: Call[WorkT, AnswerT], least_s: float) -> None:
        """Refuses a call that has waited until a pass, which takes so long at least, would end too late."""
        self._waiting.remove(call)
        call.fail(shedding.dropped("pass", self._expected_s(len(call.work), 0) or least_s))

    async def _pass(self, one: _Pass[WorkT, AnswerT]) -> None:
        queue_s = metrics.QUEUE_SECONDS.labels("pass")
        for call, _ in one.taken:
            queue_s.observe(one.started_s - call.arrived_s)
        metrics.PASS_TEXTS.observe(len(one.taken))
        try:
            with tracing.span("pass", [call.trace for call in one.calls[1:]], texts=len(one.taken)):
                work = [call.work[index] for call, index in one.taken]
                answers = await self._run_pass(work, max(call.deadline for call in one.calls))
            one.is_answered = True
        except MeshError as error:
            answers = [error] * len(one.taken)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            for call in one.calls:
                call.fail(error)
            return
        for (call, index), answer in zip(one.taken, answers, strict=True):
            if isinstance(answer, InvalidInput):
                call.fail(InvalidInput(f"texts[{index}]: {answer}", f"texts[{index}]"))
            elif isinstance(answer, MeshError):
                call.fail(answer)
            else:
                call.answers[index] = answer
                call.missing -= 1
                if call.missing == 0 and not call.done.done():
                    call.done.set_result(None)

    def _pass_ended(self, task: asyncio.Task[None]) -> None:
        ended = self._passes.pop(task)
        self._texts_under_way -= len(ended.taken)
        metrics.UNDER_WAY.labels("pass").dec()
        error = RuntimeError("a pass was cancelled") if task.cancelled() else task.exception()
        self._overlap.ended(ended.started, len(ended.taken) if ended.is_answered else 0)
        if ended.is_answered:
            pass_s = time.monotonic() - ended.started_s
            self._pass_times.at(ended.started.level).add(ended.size, pass_s)
            self._returns.answered(sum(call.done.done() for call in ended.calls), pass_s)
        elif ended.left == len(ended.calls):  # all have gone, most likely since it took too long
            self._pass_times.at(ended.started.level).add_lost(ended.size, time.monotonic() - ended.started_s)
        for call in ended.calls:
            call.passes.discard(task)
            if error is not None:  # nobody may wait for a pass that is over
                call.fail(error)
        self._start_passes()

    def _leave(self, call: Call[WorkT, AnswerT]) -> None:
        """Forgets a call that ended; a pass that works for nobody any more is cancelled."""
        call.done.cancel()
        if call in self._waiting:
            self._waiting.remove(call)
        for task in call.passes:
            self._passes[task].left += 1
            if self._passes[task].left == len(self._passes[task].calls):
                task.cancel()
