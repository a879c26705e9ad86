from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Sequence
from contextvars import ContextVar
from math import inf
from time import monotonic
from typing import Any

import pytest

from expertmesh.errors import CorruptReply, DeadlineExceeded, Unavailable
from expertmesh.rpc.alarms import Alarms
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.link.reply import Reply
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas.asked import Asked
from expertmesh.rpc.replicas.sent import Sent
from expertmesh.rpc.replicas.together import take_together

WAIT_S = 5.0
NOWHERE = Origin("", "")


def asked(reply: Reply, late_s: float = inf) -> Asked[Any]:
    call: Asked[Any] = Asked("Apply", None, Deadline.after(10), lambda reply, origin: reply, None, None)
    call.sent, call.late_s = Sent(reply, NOWHERE, 10, 10), late_s
    return call


class Together:
    """Some calls that are waited for together, and what was taken of them."""

    def __init__(self, calls: int, late_s: float = inf, wrong: Sequence[int] = ()) -> None:
        self.replies = [Reply(call) for call in range(calls)]
        self.taken: list[int] = []
        self._wrong = wrong
        self._calls = [asked(reply, late_s) for reply in self.replies]
        self.alarms = Alarms()

    def take(self, number: int) -> None:
        if number in self._wrong:
            raise CorruptReply("it cannot be right")
        self.taken.append(number)

    async def run(self) -> Sequence[int]:
        async with asyncio.timeout(WAIT_S):
            return await take_together(self._calls, self.take, self.alarms)

    def start(self) -> asyncio.Task[Sequence[int]]:
        return asyncio.create_task(self.run())


async def test_replies_are_taken_as_they_come() -> None:
    three = Together(3)
    three.replies[2].settle("here before it is waited for")
    waits = three.start()
    await asyncio.sleep(0)
    assert three.taken == [2]
    three.replies[1].settle("next")
    assert three.taken == [2, 1]  # at once, not a turn of the event loop later
    three.replies[0].settle("last")
    assert list(await waits) == []
    assert three.taken == [2, 1, 0]


@pytest.mark.parametrize("error", [Unavailable("gone", ""), DeadlineExceeded("late")])
async def test_one_that_failed_leaves_the_others_to_be_received_one_by_one(error: Exception) -> None:
    three = Together(3)
    waits = three.start()
    await asyncio.sleep(0)
    three.replies[0].settle("good")
    three.replies[1].settle(None, error)
    assert list(await waits) == [1, 2]
    three.replies[2].settle("after that")
    assert three.taken == [0]  # whoever is left is taken by nobody but who receives it


async def test_one_that_cannot_be_right_is_left_like_one_that_failed() -> None:
    two = Together(2, wrong=[0])
    waits = two.start()
    await asyncio.sleep(0)
    two.replies[0].settle("wrong")
    assert list(await waits) == [0, 1]


async def test_a_late_one_ends_the_wait() -> None:
    two = Together(2, late_s=monotonic() + 0.01)
    waits = two.start()
    await asyncio.sleep(0)
    two.replies[1].settle("in time")
    assert list(await waits) == [0]


async def test_what_is_not_under_way_yet_is_not_waited_for() -> None:
    async def call() -> tuple[str, Origin]:
        raise AssertionError("nobody asked for it here")

    two = Together(2)
    two._calls[1].sent = Sent(Reply(), NOWHERE, 10, 10, call)
    assert list(await two.run()) == [0, 1]


async def test_what_is_over_holds_on_to_nothing() -> None:
    """Rows would stay until the garbage collector came by."""
    two = Together(2)
    waits = two.start()
    await asyncio.sleep(0)
    gone = [weakref.ref(two)]
    for reply in two.replies:
        reply.settle("good")
    await waits
    gc.disable()
    try:
        del two, waits, reply
        assert gone[0]() is None
    finally:
        gc.enable()


async def test_replies_are_taken_in_the_context_of_the_request() -> None:
    request: ContextVar[str] = ContextVar("request", default="none")
    seen: list[str] = []

    class Seeing(Together):
        def take(self, number: int) -> None:
            seen.append(request.get())

    two = Seeing(2)

    async def one_request() -> Sequence[int]:
        request.set("one")
        return await two.run()

    waits = asyncio.create_task(one_request())
    await asyncio.sleep(0)
    for reply in two.replies:
        reply.settle("good")
    await waits
    assert seen == ["one", "one"]


async def test_a_bug_in_reading_is_raised_where_it_is_waited_for() -> None:
    class Buggy(Together):
        def take(self, number: int) -> None:
            raise ZeroDivisionError("a bug")

    two = Buggy(2)
    waits = two.start()
    await asyncio.sleep(0)
    two.replies[0].settle("anything")
    with pytest.raises(ZeroDivisionError):
        await waits


async def test_who_is_cancelled_takes_nothing_any_more() -> None:
    two = Together(2)
    waits = two.start()
    await asyncio.sleep(0)
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    two.replies[0].settle("too late")
    assert two.taken == []


async def test_a_reply_that_nobody_waits_for_is_told_of_once() -> None:
    left: list[int] = []
    reply = Reply(7, leave=lambda one: left.append(one.call))
    waits = asyncio.ensure_future(reply)
    await asyncio.sleep(0)
    waits.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waits
    reply.abandon()
    reply.settle("too late")
    assert left == [7]
    assert reply.message is None


async def test_what_was_abandoned_or_expired_keeps_its_first_outcome() -> None:
    reply = Reply(1)
    reply.settle("first")
    reply.settle(None, Unavailable("second", ""))
    reply.expire()
    assert await reply == "first"
    expired = Reply(2)
    expired.expire()
    with pytest.raises(DeadlineExceeded):
        await expired
