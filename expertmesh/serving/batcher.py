"""Calls that wait together share a pass through the layers.

A pass starts as soon as there is room for one; what arrives meanwhile waits and shares the next. Calls take turns, so
that one with a thousand texts does not hold up one with a single text.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from expertmesh.errors import DeadlineExceeded, InvalidInput, MeshError, Overloaded
from expertmesh.rpc.deadline import Deadline
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
        passes: Most passes under way at once.
        waiting_texts: Most texts that wait; more are refused.
        waiting_characters: Most characters that wait; more are refused.
    """

    pass_texts: int = 64
    pass_characters: int = 2**17
    passes: int = 1
    waiting_texts: int = 8192
    waiting_characters: int = 2**26


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
        self._calls: deque[_Call[WorkT, AnswerT]] = deque()
        self._waiting_texts = 0
        self._waiting_characters = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._members: dict[asyncio.Task[None], list[_Call[WorkT, AnswerT]]] = {}

    async def submit(self, work: Sequence[WorkT], deadline: Deadline) -> list[AnswerT]:
        """Answers one call's work, in its order.

        Raises:
            Overloaded: Too much waits already.
            DeadlineExceeded: It was not done in time.
            MeshError: One of its texts, or a pass it was in, failed.
        """
        if not work:
            return []
        characters = sum(map(self._weigh, work))
        texts_fit = self._waiting_texts + len(work) <= self._limits.waiting_texts
        if not texts_fit or self._waiting_characters + characters > self._limits.waiting_characters:
            raise Overloaded(f"{self._waiting_texts} texts are waiting already")
        call: _Call[WorkT, AnswerT] = _Call(
            work,
            deadline,
            [None] * len(work),
            asyncio.get_running_loop().create_future(),
            contextvars.copy_context(),
            tracing.current(),
            time.monotonic(),
            missing=len(work),
        )
        self._calls.append(call)
        self._waiting_texts += len(work)
        self._waiting_characters += characters
        self._start_passes()
        try:
            async with asyncio.timeout(deadline.remaining_s()):
                await call.done
        except TimeoutError:
            raise DeadlineExceeded("the deadline has passed") from None
        finally:
            self._leave(call)
        return call.answers  # type: ignore[return-value]

    def _start_passes(self) -> None:
        while len(self._tasks) < self._limits.passes and self._calls:
            taken = self._take()
            task = asyncio.get_running_loop().create_task(self._pass(taken), context=taken[0][0].context.copy())
            self._tasks.add(task)
            self._members[task] = list({id(call): call for call, _ in taken}.values())
            for call in self._members[task]:
                call.passes.add(task)
            task.add_done_callback(self._pass_ended)

    def _take(self) -> list[tuple[_Call[WorkT, AnswerT], int]]:
        """Takes texts for a pass: from each waiting call in turn, as (call, index of the text)."""
        taken: list[tuple[_Call[WorkT, AnswerT], int]] = []
        characters = 0
        while self._calls and len(taken) < self._limits.pass_texts:
            call = self._calls.popleft()
            for _ in range(min(TURN, self._limits.pass_texts - len(taken), len(call.work) - call.taken)):
                weight = self._weigh(call.work[call.taken])
                if taken and characters + weight > self._limits.pass_characters:
                    self._calls.appendleft(call)
                    return taken
                taken.append((call, call.taken))
                call.taken += 1
                characters += weight
                self._waiting_texts -= 1
                self._waiting_characters -= weight
            if call.taken < len(call.work):
                self._calls.append(call)
        return taken

    async def _pass(self, taken: list[tuple[_Call[WorkT, AnswerT], int]]) -> None:
        now_s = time.monotonic()
        for call, _ in taken:
            metrics.QUEUE_SECONDS.labels("pass").observe(now_s - call.arrived_s)
        metrics.PASS_TEXTS.observe(len(taken))
        links = [call.trace for call in {id(call): call for call, _ in taken}.values()][1:]
        try:
            with tracing.span("pass", links, texts=len(taken)):
                work = [call.work[index] for call, index in taken]
                answers = await self._run_pass(work, max(call.deadline for call, _ in taken))
        except MeshError as error:
            answers = [error] * len(taken)
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            for call, _ in taken:
                _fail(call, error)
            return
        for (call, index), answer in zip(taken, answers, strict=True):
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
        self._tasks.discard(task)
        error = RuntimeError("a pass was cancelled") if task.cancelled() else task.exception()
        for call in self._members.pop(task):
            call.passes.discard(task)
            if error is not None:  # nobody may wait for a pass that is over
                _fail(call, error)
        self._start_passes()

    def _leave(self, call: _Call[WorkT, AnswerT]) -> None:
        """Forgets a call that ended; a pass that works for nobody any more is cancelled."""
        call.done.cancel()
        if call in self._calls:
            self._calls.remove(call)
            self._waiting_texts -= len(call.work) - call.taken
            self._waiting_characters -= sum(map(self._weigh, call.work[call.taken :]))
        for task in call.passes:
            if all(member.done.done() for member in self._members[task]):
                task.cancel()


def _fail(call: _Call[WorkT, AnswerT], error: BaseException) -> None:
    if not call.done.done():
        call.done.set_exception(error)
