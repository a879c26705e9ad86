"""The replicas of one service: who is in it, and calls that are answered by any of them.

See `members` for who comes, goes and is asked next, `failover` for what a call does when a replica fails it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Sequence
from contextlib import aclosing
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc.aio

from expertmesh.errors import (
    CorruptReply,
    NotFinite,
    Unavailable,
)
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.link.channel import LinkChannel
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas.asked import Asked
from expertmesh.rpc.replicas.failover import Failover
from expertmesh.rpc.replicas.members import Members
from expertmesh.rpc.replicas.replica import Replica, ReplicaEvent, State
from expertmesh.rpc.replicas.resolver import Names
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
        told = admit, self._follow_event, self._can_compare

        def make(address: str) -> Replica:
            channel = open_channel(address)
            return Replica(name, address, channel, stub, open_link(address, channel, name), *told)

        self._notify = notify
        self._members = Members(make, addresses, names)
        self._failover = Failover(name, self._members, refusals_are_faults)

    async def __aenter__(self) -> Self:
        """Starts to follow every replica."""
        await self._members.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends that and closes the channels."""
        await self._failover.close()
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
        return State.LIVE in [one.state for one in self._members.replicas]

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
        return self._members.unavailable(self.name)

    async def call(
        self,
        method: str,
        request: Any,
        deadline: Deadline,
        read: Callable[[Any, Origin], ReplyT],
        at: Replica | None = None,
    ) -> ReplyT:
        """Calls one replica, and others if that is lost or answers wrongly: `begin` and `finish` in one.

        See there for arguments and errors.
        """
        return await self._failover.finish(self._failover.begin(method, request, deadline, read, at))

    def begin(
        self,
        method: str,
        request: Any,
        deadline: Deadline,
        read: Callable[[Any, Origin], ReplyT],
        at: Replica | None = None,
    ) -> Asked[ReplyT]:
        """Calls one replica; whoever does not get to `finish` abandons the call.

        Args:
            method: Name of the RPC.
            request: Its message.
            deadline: When the answer is of no use any more.
            read: Checks and reads the reply of whoever gave it; raises CorruptReply or InvalidInput if it cannot be
                right.
            at: The only replica to ask, for calls that are about what it has in memory.

        Raises:
            DeadlineExceeded: Too little time is left for a call.
        """
        return self._failover.begin(method, request, deadline, read, at)

    def take(self, asked: Asked[ReplyT]) -> ReplyT:
        """Gives the answer to a call whose reply is in.

        Raises:
            MeshError: Something is wrong with it; `finish` knows what to do about that.
        """
        return self._failover.take(asked)

    def finish(self, asked: Asked[ReplyT]) -> Coroutine[Any, Any, ReplyT]:
        """Gives the answer to a call, for which others are called if the first one is lost, late or wrong.

        Raises:
            Unavailable: No replica answered, or too many calls had to be repeated lately.
            NotFinite: NaN or infinity comes of it wherever it is computed; nobody is refused for that.
            CorruptReply: The last replica that was left answered wrongly.
            Overloaded: The last replica that was left has too much to do.
            MeshError: The service refused the call.
        """
        return self._failover.finish(asked)

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
        replica = self._members.pick(())
        if replica is None:
            raise self.unavailable()
        self._failover.begin_at(replica, "first")
        try:
            async with aclosing(replica.stream(method, request, deadline.next_hop_s(), read)) as replies:
                async for reply in replies:
                    yield reply
            replica.record.answered()
        except NotFinite:
            raise
        except Unavailable as error:
            self._failover.jury.failed(replica, str(error))
            raise
        except CorruptReply as error:
            raise self._failover.wrong(replica, error) from None

    def _can_compare(self) -> bool:
        """Whether a replica that was ejected can be compared with another before it returns."""
        return bool(self.live) and not self._failover.jury.keeps_sequences and self._failover.compares

    def _follow_event(self, happened: ReplicaEvent) -> None:
        if happened.what == "lost":
            self._members.look_up()  # whoever took its place may have another address
        self._notify(happened)
        if happened.what in ("lost", "ejected", "refused", "draining") and not self.has_live:
            for one in self.replicas:
                if one.address != happened.address:
                    one.pardon("nobody else is left")
