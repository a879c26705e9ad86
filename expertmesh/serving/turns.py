"""A device's queue: work runs there one after another, in order of arrival; what waits with one key may run together.

Nothing waits for company: work starts as soon as the device is free, and takes along what has arrived by then.
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
        self._runner: asyncio.Task[None] | None = None
        self._queue_seconds = metrics.QUEUE_SECONDS.labels(kind)
        self._work = metrics.Work(kind)

    async def run(self, rows: int, work: Callable[[], ResultT]) -> ResultT:
        """Runs work when it is its turn.

        Args:
            rows: Token rows of the work.
            work: Computes; it must not need gradients.
        """
        result: ResultT = await self._enqueue(object(), rows, None, lambda items: [work()])
        return result

    async def run_together(
        self, key: Hashable, rows: int, item: ItemT, work: Callable[[Sequence[ItemT]], Sequence[ResultT]]
    ) -> ResultT:
        """Runs work on an item when it is its turn, and on whatever else waits with the same key then.

        Args:
            key: Items with an equal one may share a run.
            rows: Token rows of the item.
            item: What to work on.
            work: Gives a result for each item; the same function for every item of a key.
        """
        result: ResultT = await self._enqueue(key, rows, item, work)
        return result

    async def _enqueue(self, key: Hashable, rows: int, item: Any, work: Callable[[Sequence[Any]], Any]) -> Any:
        loop = asyncio.get_running_loop()
        waiting = _Waiting(key, rows, item, work, loop.create_future(), perf_counter())
        self._queue.append(waiting)
        if self._runner is None or self._runner.done():
            self._runner = loop.create_task(self._run())
        return await waiting.result

    async def _run(self) -> None:
        while self._queue:
            together = self._take()
            if not together:
                continue
            rows = sum(one.rows for one in together)
            started_s = perf_counter()
            for one in together:
                self._queue_seconds.observe(started_s - one.arrived_s)
            outcomes = _compute(together)
            left_s = started_s + self._simulated.of(rows) - perf_counter()
            if left_s > 0:
                await asyncio.sleep(left_s)
            self._work.done(rows, perf_counter() - started_s)
            for one, outcome in zip(together, outcomes, strict=True):
                one.give(outcome)
            await asyncio.sleep(0)  # what has arrived meanwhile takes its place in the queue

    def _take(self) -> list[_Waiting]:
        """The next work, and what may run together with it; nobody waits for what was cancelled."""
        first = self._queue.popleft()
        if first.result.done():
            return []
        together, rows = [first], first.rows
        others = [one for one in self._queue if one.key == first.key and not one.result.done()]
        for one in others:
            if rows + one.rows > self._most_rows:
                break
            self._queue.remove(one)
            together.append(one)
            rows += one.rows
        return together


def _compute(together: Sequence[_Waiting]) -> Sequence[Any]:
    """A result for each, or the exception that ended the work."""
    try:
        with torch.inference_mode():
            return together[0].work([one.item for one in together])
    except Exception as error:
        return [error] * len(together)
