"""What comes of one call over a link, which is under way as soon as it is made."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from time import monotonic
from typing import Any

from expertmesh.errors import DeadlineExceeded


class Reply:
    """A message, or the error that the call ended with; to be awaited by one at most.

    It is no future, which would tell of itself a turn of the event loop later, and has no task and no timer of its own.

    Args:
        call: Number of the call.
        parse: Reads the message.
        leave: Is told that nobody waits for it any more.

    Attributes:
        message: What came, if the call ended well.
        is_in: Whether it has come, or nobody waits for it any more.
        in_s: When that was, on the clock of `time.monotonic`.
        error: What the call ended with, if not well.
        on_in: Is told when it comes, once.
    """

    __slots__ = ("_leave", "call", "error", "in_s", "is_in", "message", "on_in", "parse")

    def __init__(
        self,
        call: int = 0,
        parse: Callable[[Any], Any] = lambda message: message,
        leave: Callable[[Reply], None] = lambda reply: None,
    ) -> None:
        self.call, self.parse, self._leave = call, parse, leave
        self.message: Any = None
        self.error: BaseException | None = None
        self.is_in, self.in_s = False, 0.0
        self.on_in: Callable[[Reply], None] | None = None

    def settle(self, message: Any, error: BaseException | None = None) -> None:
        """It has come; whatever comes after it is not looked at."""
        if self.is_in:
            return
        self.is_in, self.in_s = True, monotonic()
        self.message, self.error = message, error
        told, self.on_in = self.on_in, None  # or whoever is told would hold on to this, and this to them
        if told is not None:
            told(self)

    def expire(self) -> None:
        """Its time is over."""
        self._leave(self)
        self.settle(None, DeadlineExceeded("the deadline has passed"))

    def abandon(self) -> None:
        """Nobody waits for it any more."""
        if not self.is_in:
            self._leave(self)
            self.on_in = None
            self.settle(None, asyncio.CancelledError())

    async def arrive(self) -> None:
        """Waits until it is in, whatever it is."""
        if self.is_in:
            return
        waiter = asyncio.get_running_loop().create_future()
        self.on_in = lambda _: None if waiter.done() else waiter.set_result(None)
        try:
            await waiter
        except BaseException:
            self.abandon()
            raise

    def __await__(self) -> Generator[Any, None, Any]:
        """Gives the message.

        Raises:
            MeshError: The call ended with it.
        """
        yield from self.arrive().__await__()
        if self.error is not None:
            raise self.error
        return self.message
