"""What one call to a service asks for, and who was asked so far."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Any, Generic, TypeVar

from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.latency import Times
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replica import Replica

ReplyT = TypeVar("ReplyT")

PATIENCE_S, PATIENCE_TIMES = 5.0, 50  # a reply that is later than both, in p95s, will not come


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
        tried: How often each address was asked.
        suspects: Who computed rows that are not finite.
    """

    method: str
    request: Any
    deadline: Deadline
    read: Callable[[Any, Origin], ReplyT]
    at: Replica | None
    times: Times | None
    tried: Counter[str] = field(default_factory=Counter)
    suspects: list[Replica] = field(default_factory=list)

    @property
    def patience_s(self) -> float:
        """How long one replica is waited for, whatever time the caller has."""
        return inf if self.times is None else max(PATIENCE_S, PATIENCE_TIMES * self.times.p95_s)
