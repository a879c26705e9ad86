"""How a replica that was ejected proves itself: it answers what a peer has answered, and nobody waits for it.

The replies of pure calls are the same bits wherever they are computed, so what was changed in its memory shows.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isnan
from time import monotonic
from typing import Any, Generic, TypeVar

from expertmesh.errors import MeshError, Overloaded
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas.ejection import SLOW_S, SLOW_TIMES, Why
from expertmesh.rpc.replicas.latency import Times
from expertmesh.rpc.replicas.replica import Replica, State
from expertmesh.telemetry import metrics

ReplyT = TypeVar("ReplyT")

TIMEOUT_S = 2.0
COMPARED: Mapping[str, Callable[[Any], Any]] = {  # of replies that also say how they came about
    "Classify": lambda reply: [(list(one.probabilities), list(one.logits)) for one in reply.results]
}


@dataclass
class Witness(Generic[ReplyT]):
    """Reads the reply to a call, and keeps it to compare others with.

    Attributes:
        read: Checks and reads it.
        reply: The message; None before there is one.
        origin: Who gave it.
    """

    read: Callable[[Any, Origin], ReplyT]
    reply: Any = None
    origin: Origin = Origin("", "")

    def __call__(self, reply: Any, origin: Origin) -> ReplyT:
        """Reads a reply that is kept if it can be right."""
        answer = self.read(reply, origin)
        self.reply, self.origin = reply, origin
        return answer


class Probation:
    """The proofs that the replicas of one service are giving.

    Args:
        service: Its name.
    """

    def __init__(self, service: str) -> None:
        self._calls = metrics.CALLS.labels(service, "proof")
        self._address2task: dict[str, asyncio.Task[None]] = {}

    def next_of(self, replicas: Sequence[Replica]) -> Replica | None:
        """A replica that has to prove itself and is not just about to."""
        now_s = monotonic()
        for one in replicas:
            if one.state is State.ON_PROBATION and one.address not in self._address2task and not one.is_busy_at(now_s):
                return one
        return None

    def begin(self, replica: Replica, method: str, request: Any, witness: Witness[Any], times: Times) -> None:
        """Has a replica answer what another has answered, unless it is about to answer something."""
        if replica.address in self._address2task:
            return
        self._calls.inc()
        task = asyncio.create_task(_prove(replica, method, request, witness, times))
        self._address2task[replica.address] = task
        task.add_done_callback(lambda _: self._address2task.pop(replica.address))

    async def close(self) -> None:
        """Ends the proofs."""
        tasks = list(self._address2task.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _prove(replica: Replica, method: str, request: Any, witness: Witness[Any], times: Times) -> None:
    """It returns if the bits are the same, and if it is not slow any more where it was."""
    is_slow = replica.record.why is Why.SLOW and not isnan(times.median_s)
    patience_s = min(TIMEOUT_S, max(SLOW_S, SLOW_TIMES * times.median_s)) if is_slow else TIMEOUT_S
    try:
        sent = replica.send(method, request, 2 * TIMEOUT_S, patience_s)
        await sent.arrive()
        reply, origin = replica.read(sent, lambda *given: given)
    except Overloaded:
        replica.is_busy()  # a later call is its next chance
        return
    except MeshError as error:
        if replica.state is State.ON_PROBATION:
            replica.eject(replica.record.why or Why.FAILING, f"on probation: {error}")
        return
    if replica.state is not State.ON_PROBATION:
        return  # it was lost, or taken back, meanwhile
    compared = COMPARED.get(method, lambda reply: reply)
    if origin.profile == witness.origin.profile and compared(reply) != compared(witness.reply):
        replica.record.differs = True
        replica.refuse("on probation: its reply is not its peer's")
    else:
        replica.record.differs = False
        replica.acquit("it answers as its peer does")
