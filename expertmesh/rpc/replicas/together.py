"""Several calls that were made at once, and are waited for at once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextvars import copy_context
from functools import partial
from math import inf
from typing import Any

from expertmesh.errors import MeshError
from expertmesh.rpc.alarms import Alarms
from expertmesh.rpc.link.reply import Reply
from expertmesh.rpc.replicas.asked import Asked

Take = Callable[[int], None]


class _Wait:
    """Takes replies as they come; over when all are taken, or something is wrong with one, or one is late."""

    __slots__ = ("_context", "_take", "left", "over")

    def __init__(self, replies: Sequence[Reply], take: Take) -> None:
        self._take, self._context = take, copy_context()  # of the request, while replies come to whoever reads the link
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.left = dict(enumerate(replies))
        for number, reply in enumerate(replies):
            if reply.is_in:
                self._one_is_in(number, reply)
            else:
                reply.on_in = partial(self._one_is_in, number)

    def __call__(self) -> None:
        """It is over, since one is late."""
        if not self.over.done():
            self.over.set_result(None)

    def _one_is_in(self, number: int, reply: Reply) -> None:
        if reply.error is None:
            try:
                self._context.run(self._take, number)
                del self.left[number]
            except MeshError:
                self()
            except Exception as error:
                if not self.over.done():
                    self.over.set_exception(error)
        if reply.error is not None or not self.left:
            self()


async def take_together(calls: Sequence[Asked[Any]], take: Take, alarms: Alarms) -> Sequence[int]:
    """Takes the replies to calls as they come, without a task for each, as long as nothing is wrong with one.

    Args:
        calls: What was sent, and not received.
        take: Is given the number of a call whose reply is in; raises MeshError if it is not what it should be.
        alarms: Tell if one is late.

    Returns:
        The numbers of those that were not taken: none, unless something is wrong with one, or one is late.
    """
    replies = [call.sent.reply for call in calls if call.sent is not None and call.sent.work is None]
    if len(replies) < len(calls):
        return range(len(calls))
    wait = _Wait(replies, take)
    late_s = min([call.late_s for call in calls])
    if late_s < inf:
        alarms.set(wait, late_s)
    try:
        await wait.over
    finally:
        alarms.withdraw(wait)
        for reply in wait.left.values():
            reply.on_in = None
    return list(wait.left)
