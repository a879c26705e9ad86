"""One replica of a service: what it holds, whether it is alive, and one attempt at a call.

It is asked what it holds before it gets traffic, and again whenever its connection was lost or it was wrong. What
happens is told as events; whoever wants to count or log them subscribes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from math import inf
from time import monotonic
from typing import Any, TypeVar

import grpc
import grpc.aio

from expertmesh.errors import MeshError, Unavailable
from expertmesh.rpc.link.channel import LinkChannel
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas.caller import Caller, require_message
from expertmesh.rpc.replicas.ejection import Record, Why
from expertmesh.rpc.replicas.sent import Sent
from expertmesh.telemetry import metrics
from expertmesh.v1.description_pb2 import DescribeRequest, DescribeResponse
from expertmesh.v1.description_pb2_grpc import DescriptionServiceStub

ReplyT = TypeVar("ReplyT")

DESCRIBE_TIMEOUT_S = 1.0
RETRY_FIRST_S = 0.1
RETRY_MOST_S = 0.5
BUSY_S = 0.1
RETRY_REFUSED_S = 2.0


class State(Enum):
    """What the gateway knows of a replica."""

    CONNECTING = "connecting"
    LIVE = "live"
    DRAINING = "draining"  # about to stop, or not listed any more: it answers, and others are asked before it
    REFUSED = "refused"
    EJECTED = "ejected"
    ON_PROBATION = "on probation"


@dataclass(frozen=True)
class ReplicaEvent:
    """Something happened to a replica.

    Attributes:
        service: Name of the service.
        address: The replica.
        what: "live", "draining", "left", "lost", "refused", "retried", "corrupt", "ejected" or "returned".
        reason: Why, in words; may be empty.
    """

    service: str
    address: str
    what: str
    reason: str = ""


class Replica:
    """One process of a service.

    Args:
        service: Name of the service.
        address: Where it is.
        channel: A channel to it.
        stub: Makes the generated stub of its gRPC service for a channel.
        link: What takes the place of the channel for the unary calls of a process that offers it.
        admit: Is shown what it says it holds; raises MeshError to refuse it.
        notify: Is told every event.
        must_prove: Whether one that was ejected is to answer as another does before it returns.

    Attributes:
        sequences: How many sequences have their caches there, as far as this program knows.
    """

    def __init__(
        self,
        service: str,
        address: str,
        channel: grpc.aio.Channel,
        stub: Callable[[Any], Any],
        link: LinkChannel,
        admit: Callable[[DescribeResponse], None],
        notify: Callable[[ReplicaEvent], None],
        must_prove: Callable[[], bool] = lambda: False,
    ) -> None:
        self.service = service
        self.address = address
        self.channel = channel
        self.state = State.CONNECTING
        self.description = DescribeResponse()
        self.sequences = 0
        self.last_turn = 0
        self._busy_until_s = 0.0
        self._caller = Caller(service, channel, stub, link)
        self._link = link
        self._admit = admit
        self._notify = notify
        self._must_prove = must_prove
        self.record = Record()
        self._left = asyncio.Event()
        self._is_listed = True
        self._told = ""  # why it could not be met, as last told
        link.on_drain = self._follow_draining

    @property
    def links(self) -> bool:
        """Whether unary calls go over a link."""
        return self.description.links

    @property
    def answers(self) -> bool:
        """Whether it was met and is not lost: it is live, or draining."""
        return self.state in (State.LIVE, State.DRAINING)

    @property
    def is_needed(self) -> bool:
        """Whether calls are under way there, or sequences have their caches there."""
        return self.answers and bool(self.calls_under_way or self.sequences)

    def list(self, is_listed: bool) -> None:
        """Says whether it still belongs to the service; one that does not is treated as one that drains."""
        self._is_listed = is_listed
        if not is_listed:
            self._follow_draining()
        elif self.state is State.DRAINING and not self._link.is_draining:
            self.state = State.LIVE
            self.tell("live")

    @property
    def calls_under_way(self) -> int:
        """Calls that it has not answered yet."""
        return self._caller.calls_under_way

    @property
    def is_connected(self) -> bool:
        """Whether the connection that calls go over is there."""
        return self._caller.is_connected

    def send(self, method: str, request: Any, timeout_s: float, patience_s: float = inf) -> Sent:
        """Calls it once; see `Caller.send`."""
        return self._caller.send(method, request, timeout_s, patience_s)

    def read(self, sent: Sent, read: Callable[[Any, Origin], ReplyT]) -> ReplyT:
        """The answer to that, once its reply is in; see `Caller.read`."""
        return self._caller.read(sent, read)

    def stream(
        self, method: str, request: Any, timeout_s: float, read: Callable[[Any], Iterable[ReplyT]]
    ) -> AsyncGenerator[ReplyT, None]:
        """Calls it once for a stream of replies; see `Caller.stream`."""
        return self._caller.stream(method, request, timeout_s, read)

    def lose(self, reason: str) -> None:
        """Takes it out of the traffic until it describes itself again."""
        if self.answers or self.state is State.ON_PROBATION:
            self._leave(State.CONNECTING, "lost", reason)

    def refuse(self, reason: str) -> None:
        """Ejects it, since its answer could not be right."""
        self.tell("corrupt", reason)
        self.eject(Why.WRONG, reason)

    def eject(self, why: Why, reason: str) -> None:
        """Takes it out of the traffic for a while, and then until it has proven itself."""
        if self.state is State.EJECTED:
            return
        pause_s = self.record.leave(why)
        metrics.EJECTIONS.labels(self.service, self.address, why.value).inc()
        self._leave(State.EJECTED, "ejected", f"{why.value}: {reason}; for {pause_s:.0f} s at least")

    def pardon(self, reason: str) -> None:
        """Takes it back, unless it was wrong and its pause is not over, or it was seen to compute other bits."""
        if self.record.differs:
            return
        if self.state is State.ON_PROBATION or (self.state is State.EJECTED and self.record.why is not Why.WRONG):
            self.acquit(reason)

    def acquit(self, reason: str) -> None:
        """Takes it back."""
        self.record.why = None
        self.state = self._standing()
        self.tell("returned", reason)

    def is_busy(self) -> None:
        """It has too much to do just now: others are asked first for a moment."""
        self._busy_until_s = monotonic() + BUSY_S

    def is_busy_at(self, now_s: float) -> bool:
        """Whether it said a moment ago that it has too much to do."""
        return now_s < self._busy_until_s

    def tell(self, what: str, reason: str = "") -> None:
        """Tells an event."""
        self._notify(ReplicaEvent(self.service, self.address, what, reason))

    async def close(self) -> None:
        """Ends its connection."""
        await self._link.close()
        await self.channel.close()

    async def follow(self) -> None:
        """Keeps its state up to date until it is cancelled."""
        wait_s = RETRY_FIRST_S
        while True:
            is_met = self.state is State.EJECTED and self.record.pause_s > 0
            if not is_met:
                try:
                    is_met = await self._introduce()
                except Exception as error:  # nothing unforeseen may end the following of a replica
                    self._leave(State.CONNECTING, "lost", f"unforeseen: {error!r}")
            if is_met:
                wait_s = RETRY_FIRST_S
                await self._until_left()
            if not is_met or self.state in (State.CONNECTING, State.REFUSED):
                await asyncio.sleep(RETRY_REFUSED_S if self.state is State.REFUSED else wait_s)
                wait_s = min(2 * wait_s, RETRY_MOST_S)

    async def _introduce(self) -> bool:
        """Asks it what it holds; gives whether it is met, and holds that."""
        try:
            description = await DescriptionServiceStub(self.channel).Describe(
                DescribeRequest(), timeout=DESCRIBE_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            if self.channel.get_state() is not grpc.ChannelConnectivity.READY:
                await self._link.close()  # what is under way there is not to wait for a process that hangs
            elif self.state is State.EJECTED:
                return False  # it is busy
            if self.state is not State.CONNECTING:
                self._leave(State.CONNECTING, "lost", error.code().name)
            return False
        if self.answers:
            return True  # it was taken back meanwhile
        try:
            require_message(description)
            self._admit(description)
            self._link.is_draining = description.draining
            if description.links:
                await self._link.open(DESCRIBE_TIMEOUT_S)
        except Unavailable as error:
            if self._told != str(error):
                self._told = str(error)
                self.tell("refused", self._told)
            return False
        except MeshError as error:
            if self.state is not State.REFUSED:
                self._leave(State.REFUSED, "refused", str(error))
            return False
        self.description = description
        self._caller.meet(description, self.links)
        self._told = ""
        if self.record.why is None:
            self.state = self._standing()
            self.tell(self.state.value)
        elif self.record.pause_s > 0:
            self.state = State.EJECTED
        elif self.record.differs or self._must_prove():
            self.state = State.ON_PROBATION
        else:
            self.acquit("its time is over, and there is nobody to compare it with")
        return True

    def _standing(self) -> State:
        """What it is if nothing is held against it."""
        return State.LIVE if self._is_listed and not self._link.is_draining else State.DRAINING

    def _follow_draining(self) -> None:
        if self.state is State.LIVE:
            self.state = State.DRAINING
            self.tell("draining")

    async def _until_left(self) -> None:
        """Waits until its state changes for the worse, its connection is gone, or its pause is over."""
        self._left.clear()
        connection = asyncio.create_task(self.channel.wait_for_state_change(grpc.ChannelConnectivity.READY))
        waits: list[asyncio.Task[Any]] = [asyncio.create_task(self._left.wait()), connection]
        if self.links:
            waits.append(asyncio.create_task(self._link.ended.wait()))
        done: set[asyncio.Task[Any]] = set()
        try:
            while not done:
                pause_s = max(0.0, self.record.pause_s) if self.state is State.EJECTED else None
                done, _ = await asyncio.wait(waits, timeout=pause_s, return_when=asyncio.FIRST_COMPLETED)
                if not done and self.state is State.EJECTED:
                    return
            if connection.done():  # it is gone, or hangs and keepalive has found out: a socket would not tell
                await self._link.close()
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        if any(wait in done for wait in waits[1:]) and self.state in _MET:
            self.record.differs = False
            self._leave(State.CONNECTING, "lost", "its connection ended")

    def _leave(self, state: State, what: str, reason: str) -> None:
        self.state = state
        self._left.set()
        self.tell(what, reason)


_MET = (State.LIVE, State.DRAINING, State.EJECTED, State.ON_PROBATION)
