"""One replica of a service: what it holds, whether it is alive, and one attempt at a call.

It is asked what it holds before it gets traffic, and again whenever its connection was lost or it was wrong. What
happens is told as events; whoever wants to count or log them subscribes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

import grpc
import grpc.aio

from expertmesh.errors import (
    CorruptReply,
    DeadlineExceeded,
    MeshError,
    NonFiniteInput,
    NotFinite,
    Unavailable,
    WrongPart,
)
from expertmesh.rpc import request_id
from expertmesh.rpc.errors import from_call
from expertmesh.rpc.link.channel import LinkChannel
from expertmesh.rpc.origin import Origin
from expertmesh.v1.description_pb2 import DescribeRequest, DescribeResponse
from expertmesh.v1.description_pb2_grpc import DescriptionServiceStub

ReplyT = TypeVar("ReplyT")

DESCRIBE_TIMEOUT_S = 1.0
ATTEMPT_TIMEOUT_S = 10.0  # a replica that takes longer is given up, whatever time the caller has
RETRY_FIRST_S = 0.1
RETRY_MOST_S = 0.5
RETRY_REFUSED_S = 5.0


class State(Enum):
    """What the gateway knows of a replica."""

    CONNECTING = "connecting"
    LIVE = "live"
    DRAINING = "draining"  # about to stop, or not listed any more: it answers, and others are asked before it
    REFUSED = "refused"


@dataclass(frozen=True)
class ReplicaEvent:
    """Something happened to a replica.

    Attributes:
        service: Name of the service.
        address: The replica.
        what: "live", "draining", "left", "lost", "refused", "retried" or "corrupt".
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
    ) -> None:
        self.service = service
        self.address = address
        self.channel = channel
        self.state = State.CONNECTING
        self.description = DescribeResponse()
        self.calls_under_way = 0
        self.sequences = 0
        self.last_turn = 0
        self._stub, self._link_stub = stub(channel), stub(link)
        self._link = link
        self._admit = admit
        self._notify = notify
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

    async def attempt(
        self, method: str, request: Any, timeout_s: float, read: Callable[[Any, Origin], ReplyT]
    ) -> ReplyT:
        """Calls it once; see `ReplicaSet.call`.

        Raises:
            Unavailable: It is gone, or took longer than `ATTEMPT_TIMEOUT_S`.
            CorruptReply: Its reply cannot be right.
            MeshError: It refused the call.
        """
        self.calls_under_way += 1
        try:
            bounded_s = min(timeout_s, ATTEMPT_TIMEOUT_S)
            if self.links:
                reply = await getattr(self._link_stub, method)(request, bounded_s)
                origin = self._link.origin
            else:
                reply, origin = await self._called(method, request, bounded_s)
        except DeadlineExceeded:
            if timeout_s <= ATTEMPT_TIMEOUT_S:
                raise
            late = f"{self.service} did not answer within {ATTEMPT_TIMEOUT_S:.0f} s"
            raise Unavailable(late, self.service) from None
        finally:
            self.calls_under_way -= 1
        _require_message(reply)
        if origin.model_digest != self.description.model_digest:
            raise CorruptReply("it comes from a process of another model")
        try:
            return read(reply, origin)
        except NonFiniteInput as error:
            raise NotFinite(str(error)) from None
        except MeshError as error:
            raise CorruptReply(str(error)) from None

    async def _called(self, method: str, request: Any, timeout_s: float) -> tuple[Any, Origin]:
        call = getattr(self._stub, method)(request, timeout=timeout_s, metadata=request_id.to_metadata())
        try:
            reply = await call
            return reply, Origin.of_metadata(await call.trailing_metadata())
        except grpc.aio.AioRpcError as error:
            raise from_call(error, self.service) from None

    async def stream(
        self, method: str, request: Any, timeout_s: float, read: Callable[[Any], Iterable[ReplyT]]
    ) -> AsyncGenerator[ReplyT, None]:
        """Calls it once for a stream of replies; see `ReplicaSet.stream`.

        Raises:
            Unavailable: It is gone.
            CorruptReply: A reply cannot be right.
            MeshError: It refused the call.
        """
        self.calls_under_way += 1
        call = getattr(self._stub, method)(request, timeout=timeout_s, metadata=request_id.to_metadata())
        try:
            async for reply in call:
                _require_message(reply)
                origin = Origin.of_metadata(await call.initial_metadata())
                if origin.model_digest != self.description.model_digest:
                    raise CorruptReply("it comes from a process of another model")
                for item in read(reply):
                    yield item
        except grpc.aio.AioRpcError as error:
            raise from_call(error, self.service) from None
        finally:
            self.calls_under_way -= 1
            call.cancel()  # a stream that nobody reads any more is not ended by itself

    def lose(self, reason: str) -> None:
        """Takes it out of the traffic until it describes itself again."""
        self._leave(State.CONNECTING, "lost", reason)

    def refuse(self, reason: str) -> None:
        """Takes it out of the traffic for a while, since its answer could not be right."""
        self._leave(State.REFUSED, "corrupt", reason)

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
            try:
                await self._introduce()
            except Exception as error:  # nothing unforeseen may end the following of a replica
                self._leave(State.CONNECTING, "lost", f"unforeseen: {error!r}")
            if self.answers:
                wait_s = RETRY_FIRST_S
                await self._until_left()
            if not self.answers:
                await asyncio.sleep(RETRY_REFUSED_S if self.state is State.REFUSED else wait_s)
                wait_s = min(2 * wait_s, RETRY_MOST_S)

    async def _introduce(self) -> None:
        try:
            description = await DescriptionServiceStub(self.channel).Describe(
                DescribeRequest(), timeout=DESCRIBE_TIMEOUT_S
            )
        except grpc.aio.AioRpcError as error:
            if self.state is not State.CONNECTING:
                self._leave(State.CONNECTING, "lost", error.code().name)
            return
        try:
            _require_message(description)
            self._admit(description)
            self._link.is_draining = description.draining
            if description.links:
                await self._link.open(DESCRIBE_TIMEOUT_S)
        except Unavailable as error:
            if self._told != str(error):
                self._told = str(error)
                self.tell("refused", self._told)
            return
        except MeshError as error:
            if self.state is not State.REFUSED:
                self._leave(State.REFUSED, "refused", str(error))
            return
        self.description = description
        self._left.clear()
        self._told = ""
        is_live = self._is_listed and not self._link.is_draining
        self.state = State.LIVE if is_live else State.DRAINING
        self.tell(self.state.value)

    def _follow_draining(self) -> None:
        if self.state is State.LIVE:
            self.state = State.DRAINING
            self.tell("draining")

    async def _until_left(self) -> None:
        """Waits until it is taken out of the traffic or its connection is gone."""
        connection = asyncio.create_task(self.channel.wait_for_state_change(grpc.ChannelConnectivity.READY))
        waits: list[asyncio.Task[Any]] = [asyncio.create_task(self._left.wait()), connection]
        if self.links:
            waits.append(asyncio.create_task(self._link.ended.wait()))
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            if connection.done():  # it is gone, or hangs and keepalive has found out: a socket would not tell
                await self._link.close()
        finally:
            for wait in waits:
                wait.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        if self.answers:
            self.lose("its connection ended")

    def _leave(self, state: State, what: str, reason: str) -> None:
        self.state = state
        self._left.set()
        self.tell(what, reason)


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
