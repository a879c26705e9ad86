"""The replicas of one service: who gets a call, and who gets it next if the first is gone or wrong.

A call goes to the live replica with the fewest calls under way, among equals in turn; one that fails because the
replica is gone, or that is answered with something that cannot be right, is repeated on another within the deadline.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from itertools import count
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
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.link.channel import LinkChannel
from expertmesh.rpc.members import Members
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replica import Replica, ReplicaEvent, State
from expertmesh.rpc.resolver import Names
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

        def make(address: str) -> Replica:
            channel = open_channel(address)
            return Replica(name, address, channel, stub, open_link(address, channel, name), admit, self._follow_event)

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
            Unavailable: No replica answered.
            NotFinite: NaN or infinity comes of it wherever it is computed; nobody is refused for that.
            CorruptReply: The last replica that was left answered wrongly.
            MeshError: The service refused the call.
        """
        tried: Counter[str] = Counter()
        suspects: list[Replica] = []
        while True:
            try:
                return await self._attempt(method, request, deadline, read, tried, suspects, at)
            except (Unavailable, CorruptReply):
                if self._pick(tried, at) is None:
                    raise

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
        replica = self._pick(Counter())
        if replica is None:
            raise self.unavailable()
        replica.last_turn = next(self._turns)
        try:
            async with aclosing(replica.stream(method, request, deadline.next_hop_s(), read)) as replies:
                async for reply in replies:
                    yield reply
        except NotFinite:
            raise
        except Unavailable as error:
            replica.lose(str(error))
            raise
        except CorruptReply as error:
            raise self._wrong(replica, error) from None

    async def _attempt(
        self,
        method: str,
        request: Any,
        deadline: Deadline,
        read: Callable[[Any, Origin], ReplyT],
        tried: Counter[str],
        suspects: list[Replica],
        at: Replica | None,
    ) -> ReplyT:
        replica = self._pick(tried, at)
        if replica is None:
            raise self.unavailable()
        if tried:
            replica.tell("retried")
        tried[replica.address] += 1
        replica.last_turn = next(self._turns)
        try:
            answer = await replica.attempt(method, request, deadline.next_hop_s(), read)
        except (NotFinite, NonFiniteInput) as error:
            suspects.append(replica)
            raise NotFinite(f"{self.name}: {error}", self.name, suspects) from None
        except Unavailable as error:
            replica.lose(str(error))
            raise
        except CorruptReply as error:
            raise self._wrong(replica, error) from None
        except (InvalidInput, WrongPart, Overloaded) as error:
            if self._refusals_are_faults and at is None:
                raise self._wrong(replica, error) from None
            raise
        for suspect in suspects:
            suspect.refuse("it computed rows that are not finite where another replica's are")
        return answer

    def _follow_event(self, happened: ReplicaEvent) -> None:
        if happened.what == "lost":
            self._members.look_up()  # whoever took its place may have another address
        self._notify(happened)

    def _wrong(self, replica: Replica, error: Exception) -> CorruptReply:
        replica.refuse(str(error))
        return CorruptReply(f"{self.name} gave a reply that cannot be right: {error}", self.name)

    def _pick(self, tried: Counter[str], at: Replica | None = None) -> Replica | None:
        if at is not None:
            return at if at.answers and not tried[at.address] else None
        left = [one for one in self.replicas if one.state is State.LIVE and not tried[one.address]] or [
            one for one in self.replicas if one.state is State.DRAINING and not tried[one.address]
        ]
        if len(left) == 1:
            return left[0]
        return min(left, key=lambda one: (one.calls_under_way, one.last_turn), default=None)
