"""A device's queue: work runs there one after another, in order of arrival; what waits with one key may run together.

Nothing waits for company: work starts as soon as the device is free, and takes along what has arrived by then. What is
known to have come alone starts at once, without a turn of the event loop in between.
It runs inside the event loop, since a thread costs more than it gives here.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

import torch

from expertmesh.telemetry import metrics

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class SimulatedTime:
    """How long a device that is not there would take; the work is done all the same, and the rest of the time waited.

    Attributes:
        step_s: Of every piece of work.
        row_s: And of every token row in it.
    """

    step_s: float = 0.0
    row_s: float = 0.0

    def of(self, rows: int) -> float:
        """Seconds that so many rows take."""
        return self.step_s + self.row_s * rows


@dataclass(eq=False, slots=True)
class _Waiting:
    key: Hashable
    rows: int
    item: Any
    work: Callable[[Sequence[Any]], Sequence[Any]]
    result: asyncio.Future[Any]
    arrived_s: float

    def give(self, outcome: Any) -> None:
        """Tells whoever waits how it went."""
        if self.result.done():
            return
        if isinstance(outcome, Exception):
            self.result.set_exception(outcome)
        else:
            self.result.set_result(outcome)


class Turns:
    """The queue of one device.

    Args:
        kind: The service, as metrics name it.
        simulated: Time that a device takes which is not there.
        most_rows: Most token rows that run together, where several callers' do.
    """

    def __init__(self, kind: str, simulated: SimulatedTime = SimulatedTime(), most_rows: int = 1024) -> None:
        self._simulated = simulated
        self._most_rows = most_rows
        self._queue: deque[_Waiting] = deque()
        self._is_running = False
        self._queue_seconds = metrics.QUEUE_SECONDS.labels(kind).observe
        self._work = metrics.Work(kind)
        self._without_gradients = torch.inference_mode()  # making one takes 1.5 µs, entering it 2.0

    def run(self, rows: int, work: Callable[[], ResultT], is_alone: bool = False) -> asyncio.Future[ResultT]:
        """Runs work when it is its turn.

        Args:
            rows: Token rows of the work.
            work: Computes; it must not need gradients.
            is_alone: Whether nothing else can have come meanwhile.

        Returns:
            The future of the result; who cancels it before its turn has nothing done.
        """
        return self._enqueue(object(), rows, None, lambda items: [work()], is_alone)

    def run_together(
        self,
        key: Hashable,
        rows: int,
        item: ItemT,
        work: Callable[[Sequence[ItemT]], Sequence[ResultT]],
        is_alone: bool = False,
    ) -> asyncio.Future[ResultT]:
        """Runs work on an item when it is its turn, and on whatever else waits with the same key then.

        Args:
            key: Items with an equal one may share a run.
            rows: Token rows of the item.
            item: What to work on.
            work: Gives a result for each item; the same function for every item of a key.
            is_alone: Whether nothing else can have come meanwhile.

        Returns:
            The future of the item's result; who cancels it before its turn has nothing done.
        """
        return self._enqueue(key, rows, item, work, is_alone)

    def _enqueue(
        self, key: Hashable, rows: int, item: Any, work: Callable[[Sequence[Any]], Any], is_alone: bool
    ) -> asyncio.Future[Any]:
        loop = asyncio.get_running_loop()
        one = _Waiting(key, rows, item, work, loop.create_future(), perf_counter())
        if is_alone and not self._is_running:
            self._is_running = True
            self._do([one])
            return one.result
        self._queue.append(one)
        if not self._is_running:
            self._is_running = True
            loop.call_soon(self._run)  # what arrives until then is taken along
        return one.result

    def _run(self) -> None:
        """Does the next piece of work, and says when the one after it is to be done."""
        together: list[_Waiting] = []
        while self._queue and not together:
            together = self._take()
        if together:
            self._do(together)
        else:
            self._is_running = False

    def _do(self, together: list[_Waiting]) -> None:
        rows = together[0].rows if len(together) == 1 else sum(one.rows for one in together)
        started_s = perf_counter()
        for one in together:
            metrics.LEDGER.enter(self._queue_seconds, started_s - one.arrived_s)
        outcomes = self._compute(together)
        left_s = started_s + self._simulated.of(rows) - perf_counter()
        if left_s > 0:
            asyncio.get_running_loop().call_later(left_s, self._end, together, outcomes, rows, started_s)
        else:
            self._end(together, outcomes, rows, started_s)

    def _end(self, together: list[_Waiting], outcomes: Sequence[Any], rows: int, started_s: float) -> None:
        self._work.done(rows, perf_counter() - started_s)
        for one, outcome in zip(together, outcomes, strict=True):
            one.give(outcome)
        if self._queue:
            asyncio.get_running_loop().call_soon(self._run)
        else:
            self._is_running = False

    def _take(self) -> list[_Waiting]:
        """The next work, and what may run together with it; nobody waits for what was cancelled."""
        first = self._queue.popleft()
        if first.result.done():
            return []
        if not self._queue:
            return [first]
        together, rows = [first], first.rows
        others = [one for one in self._queue if one.key == first.key and not one.result.done()]
        for one in others:
            if rows + one.rows > self._most_rows:
                break
            self._queue.remove(one)
            together.append(one)
            rows += one.rows
        return together

    def _compute(self, together: Sequence[_Waiting]) -> Sequence[Any]:
        """A result for each, or the exception that ended the work; nothing may end the queue."""
        try:
            with self._without_gradients:
                outcomes = together[0].work([one.item for one in together])
            if len(outcomes) != len(together):
                raise ValueError(f"the work gave {len(outcomes)} results for {len(together)} items")
            return outcomes
        except StopIteration as error:  # which futures do not take
            ended = RuntimeError("the work raised StopIteration")
            ended.__cause__ = error
            return [ended] * len(together)
        except Exception as error:
            return [error] * len(together)
