"""What one call to a service asks for, and who was asked so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any, Generic, TypeVar

from expertmesh.errors import MeshError
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas.latency import Times
from expertmesh.rpc.replicas.replica import Replica
from expertmesh.rpc.replicas.sent import Sent

ReplyT = TypeVar("ReplyT")


@dataclass(slots=True)
class Asked(Generic[ReplyT]):
    """One call.

    Attributes:
        method: Name of the RPC.
        request: Its message.
        deadline: When the answer is of no use any more.
        read: Checks and reads the reply.
        at: The only replica to ask.
        times: How long calls like it take; None unless its reply depends on nothing but the request.
        replica: Whom it was sent to last, but for a second call since that is late; None: there was nobody.
        sent: What was sent there.
        late_s: When that is late, on the clock of `time.monotonic`.
        proving: Another that has to prove itself by the same request.
        error: What is wrong with the reply that was taken.
        tried: The addresses that were asked.
        suspects: Who computed rows that are not finite.
        failed: Who failed by itself, or refused, and why: its fault if another answers.
    """

    method: str
    request: Any
    deadline: Deadline
    read: Callable[[Any, Origin], ReplyT]
    at: Replica | None
    times: Times | None
    replica: Replica | None = None
    sent: Sent | None = None
    late_s: float = inf
    proving: Replica | None = None
    error: MeshError | None = None
    tried: list[str] = field(default_factory=list)
    suspects: list[Replica] = field(default_factory=list)
    failed: list[tuple[Replica, str]] = field(default_factory=list)

    def abandon(self) -> None:
        """Nobody waits for the answer any more; that may be said of one that was received."""
        if self.sent is not None:
            self.sent.abandon()
