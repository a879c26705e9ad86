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
    MeshError,
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
from expertmesh.rpc.replicas.sent import Sent
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

    def begin(
        self,
        method: str,
        request: Any,
        deadline: Deadline,
        read: Callable[[Any, Origin], ReplyT],
        at: Replica | None,
    ) -> Asked[ReplyT]:
        """See `ReplicaSet.begin`."""
        times = None
        if at is not None:
            self.jury.keeps_sequences = True
        elif (size := size_of(method, request)) is not None:
            times = self._latency.of(method, size)
            self._compared_s = monotonic()
        asked = Asked(method, request, deadline, read, at, times)
        self.retries.earn()
        self._ask_next(asked, "first")
        return asked

    def take(self, asked: Asked[ReplyT]) -> ReplyT:
        """See `ReplicaSet.take`."""
        assert asked.replica is not None
        assert asked.sent is not None
        try:
            return self._read(asked, asked.replica, asked.sent)
        except MeshError as error:
            asked.error = error
            raise

    async def finish(self, asked: Asked[ReplyT]) -> ReplyT:
        """See `ReplicaSet.finish`."""
        while True:
            replica, sent = asked.replica, asked.sent
            if replica is None or sent is None:
                raise self._members.unavailable(self._service)
            try:
                if asked.error is not None:
                    raise asked.error
                if asked.times is None or asked.late_s == inf or sent.reply.is_in:
                    return await self._receive(asked, replica, sent)
                return await self._receive_first(asked, replica, sent, asked.times)
            except (Unavailable, CorruptReply, Overloaded) as error:
                if self._members.pick(asked.tried, asked.at) is None:
                    raise
                # what was under way when a connection ended is repeated freely: it cannot happen again to these calls
                is_free = isinstance(error, Unavailable) and not replica.is_connected
                if not is_free and not self.retries.take():
                    raise exhausted(self._service, error) from None
            self._ask_next(asked, "retry")

    @property
    def compares(self) -> bool:
        """Whether calls were made lately whose replies can be compared."""
        return monotonic() - self._compared_s < COMPARED_LATELY_S

    def begin_at(self, replica: Replica, why: str) -> None:
        """Takes down that a replica is called, and why: "first", "retry" or "hedge"."""
        metrics.LEDGER.enter(self._why2calls[why])
        replica.last_turn = next(self._turns)

    def _ask_next(self, asked: Asked[ReplyT], why: str) -> None:
        """Sends the call to whoever is next. Where there are others, it is late after a while, and may prove one."""
        asked.sent, asked.late_s, asked.error = None, inf, None
        asked.replica = replica = self._members.pick(asked.tried, asked.at)
        if replica is None:
            return
        asked.sent = self._send(asked, replica, why)
        if asked.times is not None and len(self._members.replicas) > 1:
            self._hedging.earn()
            asked.late_s = asked.sent.sent_s + self._hedging.delay_s(asked.times)
            asked.proving = self._probation.next_of(self._members.replicas)
            if asked.proving is not None and not isinstance(asked.read, Witness):
                asked.read = Witness(asked.read)

    def _send(self, asked: Asked[ReplyT], replica: Replica, why: str) -> Sent:
        if why == "retry":
            replica.tell("retried")
        self.begin_at(replica, why)
        asked.tried.append(replica.address)
        patience_s = inf if asked.times is None else asked.times.patience_s
        return replica.send(asked.method, asked.request, asked.deadline.next_hop_s(), patience_s)

    async def _receive_first(self, asked: Asked[ReplyT], replica: Replica, sent: Sent, times: Times) -> ReplyT:
        """The answer of a replica, or of another that takes part if this one is late."""
        race: Race[ReplyT] = Race(self._hedging.alarms, asked.late_s, self._second, (asked, times, sent.sent_s))
        answer = await race.run(self._receive(asked, replica, sent))
        if race.second_won:
            waited_s = monotonic() - sent.sent_s
            times.add(waited_s)
            replica.record.late(waited_s, times.median_s)
            self.jury.look(replica)
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
        return self._hedge(asked, other) if allowed else None

    async def _hedge(self, asked: Asked[ReplyT], other: Replica) -> ReplyT:
        return await self._receive(asked, other, self._send(asked, other, "hedge"))

    async def _receive(self, asked: Asked[ReplyT], replica: Replica, sent: Sent) -> ReplyT:
        await sent.arrive()
        return self._read(asked, replica, sent)

    def _read(self, asked: Asked[ReplyT], replica: Replica, sent: Sent) -> ReplyT:
        """The answer of a replica whose reply is in; takes down what that says of the replica."""
        times = asked.times
        try:
            answer = replica.read(sent, asked.read)
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
            took_s = sent.took_s()
            times.add(took_s)
            replica.record.answered(took_s, times.median_s)
            if took_s > SLOW_S:
                self.jury.look(replica)
        for suspect in asked.suspects:
            suspect.refuse("it computed rows that are not finite where another replica's are")
        for one, reason in asked.failed:
            one.refuse(f"another answered what it did not: {reason}")
        if asked.proving is not None and times is not None and isinstance(asked.read, Witness):
            self._probation.begin(asked.proving, asked.method, asked.request, asked.read, times)
        return answer

    def _suspect(self, asked: Asked[ReplyT], replica: Replica, error: Exception) -> CorruptReply:
        """Takes down who failed: if all do, it is the request, and nobody is to be left for that."""
        asked.failed.append((replica, str(error)))
        return CorruptReply(f"{self._service} gave a reply that cannot be right: {error}", self._service)

    def wrong(self, replica: Replica, error: Exception) -> CorruptReply:
        """Leaves a replica whose reply cannot be right; gives the error that says so."""
        replica.refuse(str(error))
        return CorruptReply(f"{self._service} gave a reply that cannot be right: {error}", self._service)
