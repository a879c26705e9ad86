"""One call to one replica that was made."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from time import monotonic
from typing import Any

from expertmesh.errors import MeshError
from expertmesh.rpc.link.reply import Reply
from expertmesh.rpc.origin import Origin


@dataclass(eq=False, slots=True)
class Sent:
    """A call that was made over a link, or one that is made as soon as it is waited for.

    Attributes:
        reply: What comes of it.
        origin: Where that comes from.
        timeout_s: When the answer is of no use any more.
        bounded_s: How long this replica is waited for.
        work: Makes the call, where it is not made before it is waited for; gives message and origin.
        sent_s: When it was made, on the clock of `time.monotonic`.
    """

    reply: Reply
    origin: Origin
    timeout_s: float
    bounded_s: float
    work: Callable[[], Awaitable[tuple[Any, Origin]]] | None = None
    sent_s: float = field(default_factory=monotonic)

    async def arrive(self) -> None:
        """Waits until the reply is in, whatever it is."""
        if self.work is None:
            await self.reply.arrive()
            return
        try:
            message, self.origin = await self.work()
            self.reply.settle(message)
        except MeshError as error:
            self.reply.settle(None, error)

    def took_s(self) -> float:
        """How long the reply took, which is in by now."""
        return self.reply.in_s - self.sent_s

    def abandon(self) -> None:
        """Nobody waits for it any more; that may be said of one whose reply is in."""
        self.reply.abandon()
