"""The replicas of one service: who is alive, who holds the right thing, who gets the next call.

A replica is asked what it holds before it gets traffic, and again whenever its connection was lost. A call goes to
the live replica with the fewest calls under way; one that fails because the replica is gone, or answered with
something that cannot be right, is repeated on another replica within the deadline.

What happens is told as events; whoever wants to count or log them subscribes.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import count
from types import TracebackType
from typing import Any, Self, TypeVar

import grpc
import grpc.aio
from tenacity import AsyncRetrying, RetryCallState, wait_none

from expertmesh.errors import (
    CorruptReply,
    DeadlineExceeded,
    InvalidInput,
    MeshError,
    Overloaded,
    Unavailable,
    WrongPart,
)
from expertmesh.rpc import request_id
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.errors import from_call
from expertmesh.rpc.origin import Origin
from expertmesh.v1.description_pb2 import DescribeRequest, DescribeResponse
from expertmesh.v1.description_pb2_grpc import DescriptionServiceStub

ReplyT = TypeVar("ReplyT")

DESCRIBE_TIMEOUT_S = 1.0
ATTEMPT_TIMEOUT_S = 10.0  # a replica that takes longer is given up, whatever time the caller has
RETRY_FIRST_S = 0.1
RETRY_MOST_S = 0.5
RETRY_REFUSED_S = 5.0
ATTEMPTS_BEHIND_ONE_NAME = 3


class State(Enum):
    """What the gateway knows of a replica."""

    CONNECTING = "connecting"
    LIVE = "live"
    REFUSED = "refused"


@dataclass(frozen=True)
class ReplicaEvent:
    """Something happened to a replica.

    Attributes:
        service: Name of the service.
        address: The replica.
        what: "live", "lost", "refused", "retried" or "corrupt".
        reason: Why, in words; may be empty.
    """

    service: str
    address: str
    what: str
    reason: str = ""


@dataclass(eq=False)
class Replica:
    """One address of a service; behind a DNS name there may be several processes."""

    address: str
    channel: grpc.aio.Channel
    stub: Any
    state: State = State.CONNECTING
    description: DescribeResponse = field(default_factory=DescribeResponse)
    calls_under_way: int = 0
    last_turn: int = 0
    lost: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def attempts(self) -> int:
        """How often one request may try this address."""
        return ATTEMPTS_BEHIND_ONE_NAME if self.address.startswith("dns:") else 1


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
    ) -> None:
        self.name = name
        self._refusals_are_faults = refusals_are_faults
        self._turns = count(1)
        self._admit = admit
        self._notify = notify
        self.replicas = [
            Replica(address, channel, stub(channel))
            for address, channel in ((address, open_channel(address)) for address in addresses)
        ]
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Starts to follow every replica."""
        self._tasks = [asyncio.create_task(self._follow(replica)) for replica in self.replicas]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends that and closes the channels."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for replica in self.replicas:
            await replica.channel.close()

    @property
    def live(self) -> list[Replica]:
        """The replicas that may get traffic."""
        return [replica for replica in self.replicas if replica.state is State.LIVE]

    def unavailable(self) -> Unavailable:
        """The error that says that nobody is left."""
        states = Counter(replica.state.value for replica in self.replicas)
        told = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        return Unavailable(f"no replica of {self.name} answers ({told})", self.name)

    async def call(
        self, method: str, request: Any, deadline: Deadline, read: Callable[[Any, Origin], ReplyT]
    ) -> ReplyT:
        """Calls one replica, and others if that is lost or answers wrongly.

        Args:
            method: Name of the RPC.
            request: Its message.
            deadline: When the answer is of no use any more.
            read: Checks and reads the reply of whoever gave it; raises CorruptReply or InvalidInput if it cannot be
                right.

        Raises:
            Unavailable: No replica answered.
            CorruptReply: The last replica that was left answered wrongly.
            MeshError: The service refused the call.
        """
        tried: Counter[str] = Counter()

        def is_worth_another(state: RetryCallState) -> bool:
            error = state.outcome.exception() if state.outcome else None
            return isinstance(error, Unavailable | CorruptReply) and self._pick(tried) is not None

        retrying = AsyncRetrying(retry=is_worth_another, wait=wait_none(), reraise=True, stop=lambda _: False)
        return await retrying(self._attempt, method, request, deadline, read, tried)

    async def _attempt(
        self,
        method: str,
        request: Any,
        deadline: Deadline,
        read: Callable[[Any, Origin], ReplyT],
        tried: Counter[str],
    ) -> ReplyT:
        replica = self._pick(tried)
        if replica is None:
            raise self.unavailable()
        if tried:
            self._tell(replica, "retried")
        tried[replica.address] += 1
        replica.calls_under_way += 1
        replica.last_turn = next(self._turns)
        remaining_s = deadline.next_hop_s()
        call = getattr(replica.stub, method)(
            request, timeout=min(remaining_s, ATTEMPT_TIMEOUT_S), metadata=request_id.to_metadata()
        )
        try:
            reply = await call
            origin = Origin.of_metadata(await call.trailing_metadata())
        except grpc.aio.AioRpcError as error:
            raise self._failure(replica, from_call(error, self.name), remaining_s, tried) from None
        finally:
            replica.calls_under_way -= 1
        try:
            _require_message(reply)
            if origin.model_digest != replica.description.model_digest:
                raise CorruptReply("it comes from a process of another model")
            return read(reply, origin)
        except MeshError as error:
            raise self._corrupt(replica, error) from None

    def _failure(self, replica: Replica, error: MeshError, remaining_s: float, tried: Counter[str]) -> MeshError:
        """What a failed attempt means for the call and for the replica."""
        if isinstance(error, DeadlineExceeded) and remaining_s > ATTEMPT_TIMEOUT_S:
            error = Unavailable(f"{self.name} did not answer within {ATTEMPT_TIMEOUT_S:.0f} s", self.name)
        if isinstance(error, Unavailable) and tried[replica.address] >= replica.attempts:
            self._lose(replica, error)
        if self._refusals_are_faults and isinstance(error, InvalidInput | WrongPart | Overloaded):
            return self._corrupt(replica, error)
        return error

    def _corrupt(self, replica: Replica, error: MeshError) -> CorruptReply:
        """Takes a replica whose answer cannot be right out of the traffic for a while."""
        self._tell(replica, "corrupt", str(error))
        if replica.state is State.LIVE:
            replica.state = State.REFUSED
            replica.lost.set()
        return CorruptReply(f"{self.name} gave a reply that cannot be right: {error}")

    def _pick(self, tried: Counter[str]) -> Replica | None:
        """The live replica with the fewest calls under way; among equals the one whose turn was longest ago."""
        left = [replica for replica in self.live if tried[replica.address] < replica.attempts]
        return min(left, key=lambda one: (tried[one.address], one.calls_under_way, one.last_turn), default=None)

    async def _follow(self, replica: Replica) -> None:
        wait_s = RETRY_FIRST_S
        while True:
            try:
                await self._introduce(replica)
            except Exception as error:  # nothing unforeseen may end the following of a replica
                replica.state = State.CONNECTING
                self._tell(replica, "lost", f"unforeseen: {error!r}")
            if replica.state is State.LIVE:
                wait_s = RETRY_FIRST_S
                await self._until_lost(replica)
            if replica.state is not State.LIVE:
                await asyncio.sleep(RETRY_REFUSED_S if replica.state is State.REFUSED else wait_s)
                wait_s = min(2 * wait_s, RETRY_MOST_S)

    async def _introduce(self, replica: Replica) -> None:
        try:
            description = await DescriptionServiceStub(replica.channel).Describe(
                DescribeRequest(), timeout=DESCRIBE_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            if replica.state is not State.CONNECTING:
                self._tell(replica, "lost", error.code().name)
            replica.state = State.CONNECTING
            return
        try:
            _require_message(description)
            self._admit(description)
        except MeshError as error:
            if replica.state is not State.REFUSED:
                self._tell(replica, "refused", str(error))
            replica.state = State.REFUSED
            return
        replica.description = description
        replica.lost.clear()
        replica.state = State.LIVE
        self._tell(replica, "live")

    async def _until_lost(self, replica: Replica) -> None:
        """Waits until a call finds the replica dead or its connection is gone."""
        ready = grpc.ChannelConnectivity.READY
        waits = [
            asyncio.create_task(replica.lost.wait()),
            asyncio.create_task(replica.channel.wait_for_state_change(ready)),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        if replica.state is State.LIVE:
            self._lose(replica, None)

    def _lose(self, replica: Replica, error: MeshError | None) -> None:
        replica.state = State.CONNECTING
        replica.lost.set()
        self._tell(replica, "lost", str(error or "its connection ended"))

    def _tell(self, replica: Replica, what: str, reason: str = "") -> None:
        self._notify(ReplicaEvent(self.name, replica.address, what, reason))


def _require_message(reply: Any) -> None:
    if reply is None:  # what gRPC gives, with status OK, for bytes that cannot be parsed
        raise CorruptReply("it cannot be parsed")


def require_parts(description: DescribeResponse, kind: str, model_digest: str, parts: dict[str, bytes]) -> None:
    """Refuses a replica that is of another kind or model, or that misses parts or has others.

    Raises:
        WrongPart: Says which.
    """
    if description.kind != kind:
        raise WrongPart(f"it is a {description.kind or 'stranger'}, not a {kind}")
    if description.model_digest != model_digest:
        raise WrongPart("it was started with another manifest")
    held = {part.name: part.digest for part in description.parts}
    for name, digest in parts.items():
        if name not in held:
            raise WrongPart(f"it does not hold {name}")
        if held[name] != digest:
            raise WrongPart(f"it holds another {name} than the manifest names")
