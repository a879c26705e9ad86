"""The replicas of one service: who gets a call, and who gets it next if the first is gone or wrong.

A call goes to the live replica with the fewest calls under way, among equals in turn; one that fails because the
replica is gone, or that is answered with something that cannot be right, is repeated on another within the deadline, as
far as the budget allows. A pure call that is late is given to another replica too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from itertools import count
from math import inf
from time import monotonic
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc.aio

from expertmesh.errors import (
    CorruptReply,
    InvalidInput,
    NonFiniteInput,
    NotFinite,
    Overloaded,
    Unavailable,
    WrongPart,
)
from expertmesh.rpc.asked import Asked
from expertmesh.rpc.budget import MOST, PER_CALL, Budget, exhausted
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.ejection import SLOW_S
from expertmesh.rpc.hedging import Hedging, Race, size_of
from expertmesh.rpc.jury import Jury
from expertmesh.rpc.latency import Latency, Times
from expertmesh.rpc.link.channel import LinkChannel
from expertmesh.rpc.members import Members
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.probation import Probation, Witness
from expertmesh.rpc.replica import Replica, ReplicaEvent, State
from expertmesh.rpc.resolver import Names
from expertmesh.telemetry import metrics
from expertmesh.v1.description_pb2 import DescribeResponse

ReplyT = TypeVar("ReplyT")


class ReplicaSet:
    """The replicas of one service. Use as an async context manager.

    Args:
        name: The service, as errors and events name it.
        addresses: Its replicas.
        open_channel: Makes a channel to an address.
        stub: The generated stub class of its gRPC service.
        admit: Is shown what a replica says it holds; raises MeshError to refuse it.
        notify: Is told every event.
        refusals_are_faults: Whether a call that is refused is the replica's fault, as it is where requests are made
            by the mesh itself; otherwise it is the caller's.
        open_link: Makes what unary calls go over, of address, channel and name.
        names: Makes what looks DNS names up.
    """

    def __init__(
        self,
        name: str,
        addresses: Sequence[str],
        open_channel: Callable[[str], grpc.aio.Channel],
        stub: Callable[[grpc.aio.Channel], Any],
        admit: Callable[[DescribeResponse], None],
        notify: Callable[[ReplicaEvent], None],
        refusals_are_faults: bool = False,
        open_link: Callable[[str, grpc.aio.Channel, str], LinkChannel] = LinkChannel,
        names: Callable[[Callable[[list[str]], None]], Names] = Names,
    ) -> None:
        self.name = name
        self._refusals_are_faults = refusals_are_faults
        self._turns = count(1)
        self._retries = Budget(PER_CALL, MOST, MOST)
        self._hedging, self._latency, self._probation = Hedging(), Latency(), Probation(name)
        self._why2calls = {why: metrics.CALLS.labels(name, why) for why in ("first", "retry", "hedge")}
        self._jury = Jury(lambda: self.live)
        told = admit, self._follow_event, self._can_compare

        def make(address: str) -> Replica:
            channel = open_channel(address)
            return Replica(name, address, channel, stub, open_link(address, channel, name), *told)

        self._notify = notify
        self._members = Members(make, addresses, names)

    async def __aenter__(self) -> Self:
        """Starts to follow every replica."""
        await self._members.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends that and closes the channels."""
        await self._probation.close()
        self._hedging.alarms.close()
        await self._members.__aexit__(kind, error, traceback)

    @property
    def replicas(self) -> list[Replica]:
        """Those that belong to it, and those that leave and are not gone yet."""
        return self._members.replicas

    @property
    def live(self) -> list[Replica]:
        """The replicas that may get traffic: those that drain only where there are no others."""
        return self._members.live

    @property
    def has_live(self) -> bool:
        """Whether a replica is live that does not drain."""
        return any(one.state is State.LIVE for one in self.replicas)

    @property
    def are_met(self) -> bool:
        """Whether every address has a live replica, which of a name's may be any."""
        return self._members.are_met

    def set_addresses(self, addresses: Sequence[str]) -> None:
        """Lets replicas join and leave; what is under way at one that leaves ends in peace."""
        self._members.set_addresses(addresses)

    async def leave(self) -> None:
        """Lets every replica leave, and waits until they are gone."""
        await self._members.leave()

    def unavailable(self) -> Unavailable:
        """The error that says that nobody is left."""
        states = Counter(replica.state.value for replica in self.replicas)
        told = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
        return Unavailable(f"no replica of {self.name} answers ({told})", self.name)

    async def call(
        self,
        method: str,
        request: Any,
        deadline: Deadline,
        read: Callable[[Any, Origin], ReplyT],
        at: Replica | None = None,
    ) -> ReplyT:
        """Calls one replica, and others if that is lost or answers wrongly.

        Args:
            method: Name of the RPC.
            request: Its message.
            deadline: When the answer is of no use any more.
            read: Checks and reads the reply of whoever gave it; raises CorruptReply or InvalidInput if it cannot be
                right.
            at: The only replica to ask, for calls that are about what it has in memory.

        Raises:
            Unavailable: No replica answered, or too many calls had to be repeated lately.
            NotFinite: NaN or infinity comes of it wherever it is computed; nobody is refused for that.
            CorruptReply: The last replica that was left answered wrongly.
            Overloaded: The last replica that was left has too much to do.
            MeshError: The service refused the call.
        """
        times = None
        if at is not None:
            self._jury.keeps_sequences = True
        elif (size := size_of(method, request)) is not None:
            times = self._latency.of(method, size)
        asked = Asked(method, request, deadline, read, at, times)
        self._retries.earn()
        why = "first"
        while True:
            replica = self._pick(asked.tried, at)
            if replica is None:
                raise self.unavailable()
            try:
                if times is None or len(self.replicas) == 1:
                    return await self._attempt(asked, replica, why)
                return await self._attempt_with_peers(asked, replica, why, times)
            except (Unavailable, CorruptReply, Overloaded) as error:
                if self._pick(asked.tried, at) is None:
                    raise
                # what was under way when a connection ended is repeated freely: it cannot happen again to these calls
                is_free = isinstance(error, Unavailable) and not replica.is_connected
                if not is_free and not self._retries.take():
                    raise exhausted(self.name, error) from None
            why = "retry"

    async def stream(
        self, method: str, request: Any, deadline: Deadline, read: Callable[[Any], Iterable[ReplyT]]
    ) -> AsyncGenerator[ReplyT, None]:
        """Calls one replica for a stream of replies; whoever asks knows how to go on elsewhere.

        Args:
            method: Name of the RPC.
            request: Its message.
            deadline: When the answer is of no use any more.
            read: Checks and reads a reply; raises CorruptReply if it cannot be right.

        Raises:
            Unavailable: There is no replica, or it is gone.
            CorruptReply: It answered wrongly.
            MeshError: It refused the call.
        """
        replica = self._pick(())
        if replica is None:
            raise self.unavailable()
        replica.last_turn = next(self._turns)
        self._why2calls["first"].inc()
        try:
            async with aclosing(replica.stream(method, request, deadline.next_hop_s(), read)) as replies:
                async for reply in replies:
                    yield reply
            replica.record.answered()
        except NotFinite:
            raise
        except Unavailable as error:
            self._jury.failed(replica, str(error))
            raise
        except CorruptReply as error:
            raise self._wrong(replica, error) from None

    async def _attempt_with_peers(self, asked: Asked[ReplyT], replica: Replica, why: str, times: Times) -> ReplyT:
        """An attempt that another replica takes part in if this one is late, and that proves a third one."""
        self._hedging.earn()
        proving = self._probation.next_of(self.replicas)
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
                self._jury.look(replica)
        if proving is not None and isinstance(asked.read, Witness):
            self._probation.begin(proving, asked.method, asked.request, asked.read, times)
        return answer

    def _second(
        self, asked: Asked[ReplyT], times: Times, started_s: float
    ) -> Coroutine[Any, Any, ReplyT] | float | None:
        """A call to another than the one that is late; or when to ask again; None: there is nobody."""
        other = self._pick(asked.tried)
        if other is None or other.address in asked.tried:
            return None
        now_s = monotonic()
        allowed = self._hedging.allows(now_s - started_s, times)
        if isinstance(allowed, float):
            return now_s + allowed
        return self._attempt(asked, other, "hedge") if allowed else None

    async def _attempt(self, asked: Asked[ReplyT], replica: Replica, why: str) -> ReplyT:
        if why == "retry":
            replica.tell("retried")
        self._why2calls[why].inc()
        asked.tried.append(replica.address)
        replica.last_turn = next(self._turns)
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
            raise NotFinite(f"{self.name}: {error}", self.name, asked.suspects) from None
        except Unavailable as error:
            self._jury.failed(replica, str(error))
            raise
        except CorruptReply as error:
            raise self._wrong(replica, error) from None
        except (InvalidInput, WrongPart) as error:
            if self._refusals_are_faults and asked.at is None:
                raise self._wrong(replica, error) from None
            raise
        if times is None:
            replica.record.answered()
        else:
            took_s = monotonic() - started_s
            times.add(took_s)
            replica.record.answered(took_s, times.median_s)
            if took_s > SLOW_S:
                self._jury.look(replica)
        for suspect in asked.suspects:
            suspect.refuse("it computed rows that are not finite where another replica's are")
        return answer

    def _can_compare(self) -> bool:
        """Whether a replica that was ejected can be compared with another before it returns."""
        return bool(self.live) and not self._jury.keeps_sequences

    def _follow_event(self, happened: ReplicaEvent) -> None:
        if happened.what == "lost":
            self._members.look_up()  # whoever took its place may have another address
        self._notify(happened)
        if happened.what in ("lost", "ejected", "refused", "draining") and not self.has_live:
            for one in self.replicas:
                if one.address != happened.address:
                    one.pardon("nobody else is left")

    def _wrong(self, replica: Replica, error: Exception) -> CorruptReply:
        replica.refuse(str(error))
        return CorruptReply(f"{self.name} gave a reply that cannot be right: {error}", self.name)

    def _pick(self, tried: Sequence[str], at: Replica | None = None) -> Replica | None:
        if at is not None:
            return at if at.answers and at.address not in tried else None
        best, least = None, (inf, inf, inf)
        for one in self.replicas:
            if one.answers and one.address not in tried:
                rank = (one.state is State.DRAINING, one.calls_under_way, one.last_turn)
                if rank < least:
                    best, least = one, rank
        return best
