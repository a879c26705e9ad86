"""Calls that wait together share a pass through the layers.

A pass starts as soon as there is room for one, or a moment later where those that were just answered are about to come
back (`returns`); what arrives meanwhile waits and shares the next. Calls take turns, so
that one with a thousand texts does not hold up one with a single text; and the oldest has a turn in every pass, so that
it is not held up for ever by those that come. What would be answered too late is refused.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from expertmesh.errors import DeadlineExceeded, InvalidInput, MeshError
from expertmesh.rpc.deadline import Deadline
from expertmesh.serving import shedding
from expertmesh.serving.overlap import MOST_LEVEL, Overlap, Started
from expertmesh.serving.pass_times import PassTimes
from expertmesh.serving.returns import Returns
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
class _Call(Generic[WorkT, AnswerT]):
    """One caller's texts: those that wait, and the answers to all of them."""

    work: Sequence[WorkT]
    deadline: Deadline
    answers: list[AnswerT | None]
    done: asyncio.Future[None]
    context: contextvars.Context
    trace: object
    arrived_s: float
    taken: int = 0
    missing: int = 0
    passes: set[asyncio.Task[None]] = field(default_factory=set)


@dataclass(eq=False)
class _Pass(Generic[WorkT, AnswerT]):
    """A pass that is under way, whose texts are in it, and how many of its calls ended meanwhile."""

    taken: Sequence[tuple[_Call[WorkT, AnswerT], int]]
    calls: Sequence[_Call[WorkT, AnswerT]]
    started: Started
    started_s: float
    is_answered: bool = False
    left: int = 0


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
        self._turns: OrderedDict[_Call[WorkT, AnswerT], None] = (
            OrderedDict()
        )  # those that wait, whose turn is next first
        self._ages: OrderedDict[_Call[WorkT, AnswerT], None] = OrderedDict()  # the same, oldest first
        self._waiting_texts = 0
        self._waiting_characters = 0
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
        call: _Call[WorkT, AnswerT] = _Call(
            work,
            deadline,
            [None] * len(work),
            loop.create_future(),
            contextvars.copy_context(),
            tracing.current(),
            time.monotonic(),
            missing=len(work),
        )
        self._turns[call] = self._ages[call] = None
        self._waiting_texts += len(work)
        self._waiting_characters += characters
        self._returns.came()
        if not self._is_starting:  # when all that arrived at the same time are here
            self._is_starting = True
            loop.call_soon(self._start_passes)
        timer = loop.call_later(left_s, _fail, call, DeadlineExceeded("the deadline has passed"))
        try:
            await call.done
        finally:
            timer.cancel()
            self._leave(call)
        return call.answers  # type: ignore[return-value]

    def _check_room(self, texts: int, characters: int, deadline: Deadline) -> None:
        texts_fit = self._waiting_texts + texts <= self._limits.waiting_texts
        if not texts_fit or self._waiting_characters + characters > self._limits.waiting_characters:
            waiting = f"{self._waiting_texts} texts"
            raise shedding.refuse_full("pass", waiting, self._expected_s(texts, characters))
        if self._limits.sheds and (expected_s := self._expected_s(texts, characters)) is not None:
            shedding.refuse_late("pass", expected_s, deadline)

    def _expected_s(self, texts: int, characters: int) -> float | None:
        """How long a new call would take, if that is known and anything waits."""
        if not self._pass_times.are_known or not self._turns:
            return None
        turns = -(-texts // TURN)
        texts += min(self._waiting_texts, turns * TURN * len(self._turns))
        characters += self._waiting_characters if texts > self._waiting_texts else 0
        passes = max(1.0, texts / self._limits.pass_texts, characters / self._limits.pass_characters)
        under_way = self._passes.values()
        before_s = sum(self._pass_times.left_s(len(one.taken), one.started_s) for one in under_way)
        return before_s / max(1, len(under_way)) + passes * self._pass_times.of(texts / passes) / self._level()

    def _level(self) -> int:
        return self._overlap.level(*self._load())

    def _load(self) -> tuple[int, int]:
        texts = self._waiting_texts + self._texts_under_way
        return min(texts, MOST_LEVEL * self._limits.pass_texts), texts

    def _start_passes(self) -> None:
        self._is_starting = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        is_full = self._waiting_texts >= self._limits.pass_texts
        if self._turns and not is_full and (wait_s := self._returns.wait_s()):
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._start_passes)
            return
        while self._turns and len(self._passes) < self._level():
            started = self._overlap.started(*self._load())
            taken = self._take(-(-self._load()[1] // started.level))
            one = _Pass(taken, list(dict.fromkeys(call for call, _ in taken)), started, time.monotonic())
            task = asyncio.get_running_loop().create_task(self._pass(one), context=one.calls[0].context.copy())
            self._passes[task] = one
            self._texts_under_way += len(taken)
            metrics.UNDER_WAY.labels("pass").inc()
            for call in one.calls:
                call.passes.add(task)
            task.add_done_callback(self._pass_ended)

    def _take(self, share: int) -> list[tuple[_Call[WorkT, AnswerT], int]]:
        """Takes texts for a pass: from each waiting call in turn, as (call, index of the text).

        Args:
            share: Most texts, so that as many are left for the other passes that are to be under way.
        """
        most = min(share, self._limits.pass_texts)
        taken: list[tuple[_Call[WorkT, AnswerT], int]] = []
        characters = 0
        self._turns.move_to_end(next(iter(self._ages)), last=False)
        while self._turns and len(taken) < most:
            call = next(iter(self._turns))
            is_hopeless = self._limits.sheds and self._pass_times.is_hopeless(call.deadline)
            if is_hopeless and (taken or len(self._turns) > 1):
                self._remove(call)
                expected_s = self._expected_s(len(call.work), 0) or self._pass_times.of(1)
                _fail(call, shedding.dropped("pass", expected_s))
                continue
            if self._limits.sheds:
                most = min(most, self._pass_times.most_texts(call.deadline))
            for _ in range(min(TURN, most - len(taken), len(call.work) - call.taken)):
                weight = self._weigh(call.work[call.taken])
                if taken and characters + weight > self._limits.pass_characters:
                    return taken
                taken.append((call, call.taken))
                call.taken += 1
                characters += weight
                self._waiting_texts -= 1
                self._waiting_characters -= weight
            self._turns.move_to_end(call)
            if call.taken == len(call.work):
                self._remove(call)
        return taken

    def _remove(self, call: _Call[WorkT, AnswerT]) -> None:
        """It does not wait any more."""
        del self._turns[call], self._ages[call]
        self._waiting_texts -= len(call.work) - call.taken
        self._waiting_characters -= sum(map(self._weigh, call.work[call.taken :]))

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
                _fail(call, error)
            return
        for (call, index), answer in zip(one.taken, answers, strict=True):
            if isinstance(answer, InvalidInput):
                _fail(call, InvalidInput(f"texts[{index}]: {answer}", f"texts[{index}]"))
            elif isinstance(answer, MeshError):
                _fail(call, answer)
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
            self._pass_times.add(len(ended.taken), pass_s)
            self._returns.answered(sum(call.done.done() for call in ended.calls), pass_s)
        elif ended.left == len(ended.calls):  # all have gone, most likely since it took too long
            self._pass_times.add_lost(len(ended.taken), time.monotonic() - ended.started_s)
        for call in ended.calls:
            call.passes.discard(task)
            if error is not None:  # nobody may wait for a pass that is over
                _fail(call, error)
        self._start_passes()

    def _leave(self, call: _Call[WorkT, AnswerT]) -> None:
        """Forgets a call that ended; a pass that works for nobody any more is cancelled."""
        call.done.cancel()
        if call in self._turns:
            self._remove(call)
        for task in call.passes:
            self._passes[task].left += 1
            if self._passes[task].left == len(self._passes[task].calls):
                task.cancel()


def _fail(call: _Call[WorkT, AnswerT], error: BaseException) -> None:
    if not call.done.done():
        call.done.set_exception(error)
