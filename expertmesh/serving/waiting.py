"""Calls whose texts wait for a pass, and whose turn is next."""

from __future__ import annotations

import asyncio
import contextvars
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from expertmesh.rpc.deadline import Deadline

WorkT = TypeVar("WorkT")
AnswerT = TypeVar("AnswerT")


@dataclass(eq=False)
class Call(Generic[WorkT, AnswerT]):
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

    def fail(self, error: BaseException) -> None:
        """Ends it with an error, unless it has ended."""
        if not self.done.done():
            self.done.set_exception(error)


class Waiting(Generic[WorkT, AnswerT]):
    """What waits.

    Args:
        weigh: Characters of a text.

    Attributes:
        texts: How many wait.
        characters: Of all of these.
    """

    def __init__(self, weigh: Callable[[WorkT], int]) -> None:
        self._weigh = weigh
        self._turns: OrderedDict[Call[WorkT, AnswerT], None] = OrderedDict()  # whose turn is next first
        self._ages: OrderedDict[Call[WorkT, AnswerT], None] = OrderedDict()  # the same, oldest first
        self.texts = 0
        self.characters = 0

    def __len__(self) -> int:
        """Calls."""
        return len(self._turns)

    def __contains__(self, call: Call[WorkT, Any]) -> bool:
        """Whether any text of a call waits."""
        return call in self._turns

    @property
    def size(self) -> int:
        """Of all texts that wait; every text adds one to its characters."""
        return self.texts + self.characters

    @property
    def next(self) -> Call[WorkT, AnswerT]:
        """Whose turn it is."""
        return next(iter(self._turns))

    def weight(self, call: Call[WorkT, AnswerT]) -> int:
        """Characters of a call's next text."""
        return self._weigh(call.work[call.taken])

    def add(self, call: Call[WorkT, AnswerT], characters: int) -> None:
        """All of a call's texts wait, which have so many characters; its turn is after everybody's."""
        self._turns[call] = self._ages[call] = None
        self.texts += len(call.work)
        self.characters += characters

    def remove(self, call: Call[WorkT, AnswerT]) -> None:
        """No text of a call waits any more."""
        del self._turns[call], self._ages[call]
        self.texts -= len(call.work) - call.taken
        self.characters -= sum(map(self._weigh, call.work[call.taken :]))

    def prefer_oldest(self) -> None:
        """The oldest call is next."""
        self._turns.move_to_end(next(iter(self._ages)), last=False)

    def take(self, call: Call[WorkT, AnswerT]) -> int:
        """A call's next text waits no more; gives its index."""
        self.texts -= 1
        self.characters -= self.weight(call)
        call.taken += 1
        return call.taken - 1

    def end_turn(self, call: Call[WorkT, AnswerT]) -> None:
        """A call's turn is over; whatever is left of it waits behind the others."""
        if call.taken < len(call.work):
            self._turns.move_to_end(call)
        else:
            self.remove(call)
