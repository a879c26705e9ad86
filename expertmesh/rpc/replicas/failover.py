"""What one call to a service does when a replica is lost, wrong, late or busy.

One that fails because the replica is gone, or that is answered with something that cannot be right, is repeated on
another within the deadline, as far as the budget allows. A pure call that is late is given to another replica too.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from itertools import count
from math import inf
from time import monotonic
from typing import Any, TypeVar

from expertmesh.errors import (
    CorruptReply,
    Failed,
    InvalidInput,
    NonFiniteInput,
    NotFinite,
    Overloaded,
    Unavailable,
    WrongPart,
)
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas.asked import Asked
from expertmesh.rpc.replicas.budget import MOST, PER_CALL, Budget, exhausted
from expertmesh.rpc.replicas.ejection import SLOW_S
from expertmesh.rpc.replicas.hedging import Hedging, Race, size_of
from expertmesh.rpc.replicas.jury import Jury
from expertmesh.rpc.replicas.latency import Latency, Times
from expertmesh.rpc.replicas.members import Members
from expertmesh.rpc.replicas.probation import Probation, Witness
from expertmesh.rpc.replicas.replica import Replica, State
from expertmesh.telemetry import metrics

ReplyT = TypeVar("ReplyT")

COMPARED_LATELY_S = 10.0


class Failover:
    """Makes the calls of one service.

    Args:
        service: Its name.
        members: Its replicas.
        refusals_are_faults: Whether a call that is refused is the replica's fault.

    Attributes:
        retries: How many calls may be repeated.
        jury: Leaves replicas that are bad.
    """

    def __init__(self, service: str, members: Members, refusals_are_faults: bool) -> None:
        self._service, self._members = service, members
        self.refusals_are_faults = refusals_are_faults
        self._turns = count(1)
        self.retries = Budget(PER_CALL, MOST, MOST)
        self._hedging, self._latency, self._probation = Hedging(), Latency(), Probation(service)
        self._why2calls = {why: metrics.CALLS.labels(service, why).inc for why in ("first", "retry", "hedge")}
        self.jury = Jury(lambda: members.live)
        self._compared_s = -inf

    async def close(self) -> None:
        """Ends what nobody waits for."""
        await self._probation.close()
        self._hedging.alarms.close()

    async def call(
        self,
        method: str,
        request: Any,
        deadline: Deadline,
        read: Callable[[Any, Origin], ReplyT],
        at: Replica | None,
    ) -> ReplyT:
        """See `ReplicaSet.call`."""
        times = None
        if at is not None:
            self.jury.keeps_sequences = True
        elif (size := size_of(method, request)) is not None:
            times = self._latency.of(method, size)
            self._compared_s = monotonic()
        asked = Asked(method, request, deadline, read, at, times)
        self.retries.earn()
        why = "first"
        while True:
            replica = self._members.pick(asked.tried, at)
            if replica is None:
                raise self._members.unavailable(self._service)
            try:
                if times is None or len(self._members.replicas) == 1:
                    return await self._attempt(asked, replica, why)
                return await self._attempt_with_peers(asked, replica, why, times)
            except (Unavailable, CorruptReply, Overloaded) as error:
                if self._members.pick(asked.tried, at) is None:
                    raise
                # what was under way when a connection ended is repeated freely: it cannot happen again to these calls
                is_free = isinstance(error, Unavailable) and not replica.is_connected
                if not is_free and not self.retries.take():
                    raise exhausted(self._service, error) from None
            why = "retry"

    @property
    def compares(self) -> bool:
        """Whether calls were made lately whose replies can be compared."""
        return monotonic() - self._compared_s < COMPARED_LATELY_S

    def begin(self, replica: Replica, why: str) -> None:
        """Takes down that a replica is called, and why: "first", "retry" or "hedge"."""
        metrics.LEDGER.enter(self._why2calls[why])
        replica.last_turn = next(self._turns)

    async def _attempt_with_peers(self, asked: Asked[ReplyT], replica: Replica, why: str, times: Times) -> ReplyT:
        """An attempt that another replica takes part in if this one is late, and that proves a third one."""
        self._hedging.earn()
        proving = self._probation.next_of(self._members.replicas)
        if proving is not None and not isinstance(asked.read, Witness):
            asked.read = Witness(asked.read)
        delay_s = self._hedging.delay_s(times)
        if delay_s == inf:
            answer = await self._attempt(asked, replica, why)
        else:
            started_s = monotonic()
            race = Race(self._hedging.alarms, started_s + delay_s, self._second, (asked, times, started_s))
            answer = await race.run(self._attempt(asked, replica, why))
            if race.second_won:
                waited_s = monotonic() - started_s
                times.add(waited_s)
                replica.record.late(waited_s, times.median_s)
                self.jury.look(replica)
        if proving is not None and isinstance(asked.read, Witness):
            self._probation.begin(proving, asked.method, asked.request, asked.read, times)
        return answer

    def _second(
        self, asked: Asked[ReplyT], times: Times, started_s: float
    ) -> Coroutine[Any, Any, ReplyT] | float | None:
        """A call to another than the one that is late; or when to ask again; None: there is nobody."""
        other = self._members.pick(asked.tried)
        if other is None or other.state is not State.LIVE:
            return None
        now_s = monotonic()
        allowed = self._hedging.allows(now_s - started_s, times)
        if isinstance(allowed, float):
            return now_s + allowed
        return self._attempt(asked, other, "hedge") if allowed else None

    async def _attempt(self, asked: Asked[ReplyT], replica: Replica, why: str) -> ReplyT:
        if why == "retry":
            replica.tell("retried")
        self.begin(replica, why)
        asked.tried.append(replica.address)
        times, started_s = asked.times, monotonic()
        try:
            answer = await replica.attempt(
                asked.method,
                asked.request,
                asked.deadline.next_hop_s(),
                asked.read,
                inf if times is None else times.patience_s,
            )
        except (NotFinite, NonFiniteInput) as error:
            asked.suspects.append(replica)
            raise NotFinite(f"{self._service}: {error}", self._service, asked.suspects) from None
        except Unavailable as error:
            self.jury.failed(replica, str(error))
            raise
        except Failed as error:
            if asked.at is not None:
                raise self.wrong(replica, error) from None
            raise self._suspect(asked, replica, error) from None
        except CorruptReply as error:
            raise self.wrong(replica, error) from None
        except (InvalidInput, WrongPart) as error:
            if self.refusals_are_faults and asked.at is None:
                raise self._suspect(asked, replica, error) from None
            raise
        except Overloaded:
            replica.is_busy()
            raise
        if times is None:
            replica.record.answered()
        else:
            took_s = monotonic() - started_s
            times.add(took_s)
            replica.record.answered(took_s, times.median_s)
            if took_s > SLOW_S:
                self.jury.look(replica)
        for suspect in asked.suspects:
            suspect.refuse("it computed rows that are not finite where another replica's are")
        for one, reason in asked.failed:
            one.refuse(f"another answered what it did not: {reason}")
        return answer

    def _suspect(self, asked: Asked[ReplyT], replica: Replica, error: Exception) -> CorruptReply:
        """Takes down who failed: if all do, it is the request, and nobody is to be left for that."""
        asked.failed.append((replica, str(error)))
        return CorruptReply(f"{self._service} gave a reply that cannot be right: {error}", self._service)

    def wrong(self, replica: Replica, error: Exception) -> CorruptReply:
        """Leaves a replica whose reply cannot be right; gives the error that says so."""
        replica.refuse(str(error))
        return CorruptReply(f"{self._service} gave a reply that cannot be right: {error}", self._service)
