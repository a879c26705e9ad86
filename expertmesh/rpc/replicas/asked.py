"""What one call to a service asks for, and who was asked so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas.latency import Times
from expertmesh.rpc.replicas.replica import Replica

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
    tried: list[str] = field(default_factory=list)
    suspects: list[Replica] = field(default_factory=list)
    failed: list[tuple[Replica, str]] = field(default_factory=list)
