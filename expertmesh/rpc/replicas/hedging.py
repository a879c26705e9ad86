"""Hedging: a pure call whose reply is late is given to another replica too, and whoever answers first is right.

Both would give the same bits. It knows no replicas; see `rpc.replicas.replica_set` for who is asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextvars import copy_context
from typing import Any, Generic, TypeVar

from expertmesh.errors import DeadlineExceeded
from expertmesh.rpc.alarms import Alarms
from expertmesh.rpc.replicas.budget import Budget
from expertmesh.rpc.replicas.latency import Times

AnswerT = TypeVar("AnswerT")
Second = Callable[..., "Coroutine[Any, Any, AnswerT] | float | None"]

PER_CALL = 0.05
MOST = 16.0
FLOOR_S = 0.02  # what takes less is not worth a second call, on cores that have other things to do too
TIMES_FOR_ALL = 3  # of the p95: one that is so late may have the last token


def _rows(tensor: Any) -> int:
    shape = tensor.shape
    return shape[0] if shape else 0


PURE: Mapping[str, Callable[[Any], int | None]] = {
    "Apply": lambda request: _rows(request.rows),
    "Classify": lambda request: len(request.texts),
    "Decode": lambda request: _rows(request.ids),
    "DecodeBatch": lambda request: _rows(request.ids),
    "Embed": lambda request: _rows(request.ids),
    "Encode": lambda request: len(request.texts),
    "EncodePrompt": lambda request: 1,
    "Gate": lambda request: None if request.places else _rows(request.rows),
    "Sample": lambda request: _rows(request.rows),
    "Score": lambda request: _rows(request.rows),
    "Share": lambda request: _rows(request.rows),
}


def size_of(method: str, request: Any) -> int | None:
    """How much a request asks for, in rows or texts; None if its reply depends on more than itself."""
    size = PURE.get(method)
    return None if size is None else size(request)


class Hedging:
    """When a call of one service may be given to a second replica: after the p95 of calls like it.

    One call in twenty is later than that by nature, so the lower half of the budget is kept for those that are
    `TIMES_FOR_ALL` as late: such as are asked of a replica that hangs.

    Attributes:
        alarms: Tell which calls are late.
    """

    def __init__(self) -> None:
        self._budget = Budget(PER_CALL, MOST, 0.0)
        self.alarms = Alarms()

    def earn(self) -> None:
        """A call was made that may be hedged."""
        self._budget.earn()

    def delay_s(self, times: Times) -> float:
        """How long a first reply is waited for; infinite if too little is known."""
        return times.p95_s if times.p95_s > FLOOR_S else FLOOR_S

    def allows(self, waited_s: float, times: Times) -> bool | float:
        """Whether there is a token for a call that has waited so long; if not yet, how much longer it must wait."""
        late_s = TIMES_FOR_ALL * self.delay_s(times)
        if waited_s < late_s and not self._budget.is_half_full:
            return late_s - waited_s
        return self._budget.take()


class Race(Generic[AnswerT]):
    """A call, and a second one that is begun if the first is late.

    Args:
        alarms: Tells that the first is late.
        late_s: When it is, on the clock of `time.monotonic`.
        second: Is asked then for the second call, or for the time to ask again; None: there will be none.
        arguments: Of that.

    Attributes:
        second_won: Whether the second has answered while the first had not.
    """

    __slots__ = (
        "_alarms", "_arguments", "_context", "_is_over", "_late_s", "_other", "_second", "_task", "second_won"
    )  # fmt: skip

    def __init__(self, alarms: Alarms, late_s: float, second: Second[AnswerT], arguments: tuple[Any, ...] = ()) -> None:
        self._alarms, self._late_s = alarms, late_s
        self._second, self._arguments = second, arguments
        self._context = copy_context()  # the second call is of the same request
        self._other: asyncio.Task[AnswerT] | None = None
        self._task: asyncio.Task[Any] | None = None
        self._is_over = self.second_won = False

    async def run(self, first: Coroutine[Any, Any, AnswerT]) -> AnswerT:
        """Gives the answer of whichever comes first; the other is cancelled, and what it says is not read.

        Raises:
            MeshError: The first failed, and no second one answered.
        """
        self._task = task = asyncio.current_task()
        cancelling = task.cancelling() if task is not None else 0
        self._alarms.set(self, self._late_s)
        try:
            answer = await first
            if self.second_won and task is not None:
                task.uncancel()  # it had an answer all the same
            return answer
        except BaseException as error:
            if self.second_won and self._other is not None and task is not None:
                if task.uncancel() > cancelling:
                    raise  # somebody else wants the call to end as well
                return self._other.result()
            if self._other is None or isinstance(error, asyncio.CancelledError | DeadlineExceeded):
                raise
            self._is_over = True
            return await self._other
        finally:
            self._is_over = True
            self._alarms.withdraw(self)
            if self._other is not None:
                self._other.cancel()

    def __call__(self) -> None:
        """The first is late."""
        second = self._context.run(self._second, *self._arguments)
        if isinstance(second, float):
            self._alarms.set(self, second)
        elif second is not None:
            self._other = asyncio.get_running_loop().create_task(second, context=self._context)
            self._other.add_done_callback(self._answered)

    def _answered(self, other: asyncio.Task[AnswerT]) -> None:
        if other.cancelled() or other.exception() is not None or self._is_over or self._task is None:
            return  # if it failed the first goes on
        self._is_over = self.second_won = True
        self._task.cancel()
