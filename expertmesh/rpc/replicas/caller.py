"""Calls to one replica, over its link or its channel; each is made once.

It does not know of other replicas; see `rpc.replicas.replica_set` for who is asked next.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from functools import partial
from math import inf
from typing import Any, TypeVar

import grpc
import grpc.aio

from expertmesh.errors import CorruptReply, DeadlineExceeded, MeshError, NonFiniteInput, NotFinite, Unavailable
from expertmesh.rpc import request_id
from expertmesh.rpc.errors import from_call
from expertmesh.rpc.link.channel import LinkChannel
from expertmesh.rpc.link.reply import Reply
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas.sent import Sent
from expertmesh.v1.description_pb2 import DescribeResponse

ReplyT = TypeVar("ReplyT")

ATTEMPT_TIMEOUT_S = 10.0  # a replica that takes longer is given up, whatever time the caller has
NOWHERE = Origin("", "")


class Caller:
    """Makes calls to one replica.

    Args:
        service: Name of the service.
        channel: A channel to it.
        stub: Makes the generated stub of its gRPC service for a channel.
        link: What takes the place of the channel for the unary calls of a process that offers it.
    """

    def __init__(self, service: str, channel: grpc.aio.Channel, stub: Callable[[Any], Any], link: LinkChannel) -> None:
        self._service = service
        self._channel, self._link = channel, link
        self._stub, self._link_stub = stub(channel), stub(link)
        self._description, self._links = DescribeResponse(), False
        self._own_under_way = 0

    def meet(self, description: DescribeResponse, links: bool) -> None:
        """Takes over what the replica says of itself: every reply must come from a process of that model.

        Args:
            description: What it says.
            links: Whether unary calls go over the link.
        """
        self._description, self._links = description, links

    @property
    def is_connected(self) -> bool:
        """Whether the connection that calls go over is there."""
        if self._links:
            return not self._link.ended.is_set()
        return self._channel.get_state() is grpc.ChannelConnectivity.READY

    @property
    def calls_under_way(self) -> int:
        """Calls that have not ended."""
        return self._own_under_way + self._link.calls_under_way

    def send(self, method: str, request: Any, timeout_s: float, patience_s: float = inf) -> Sent:
        """Calls it once; over a link, the call is under way when this returns, unless it is traced.

        Args:
            method: Name of the RPC.
            request: Its message.
            timeout_s: When the answer is of no use any more.
            patience_s: How long this replica is waited for.
        """
        bounded_s = min(timeout_s, patience_s, ATTEMPT_TIMEOUT_S)
        if not self._links or self._link.is_traced:
            call = self._called_over_link if self._links else self._called
            return Sent(Reply(), NOWHERE, timeout_s, bounded_s, partial(call, method, request, bounded_s))
        reply = getattr(self._link_stub, method)(request, bounded_s)
        return Sent(reply, self._link.origin, timeout_s, bounded_s)

    def read(self, sent: Sent, read: Callable[[Any, Origin], ReplyT]) -> ReplyT:
        """Gives the answer to a call whose reply is in; see `ReplicaSet.finish`.

        Raises:
            Unavailable: It is gone, or took longer than the patience or `ATTEMPT_TIMEOUT_S`.
            CorruptReply: Its reply cannot be right.
            MeshError: It refused the call.
        """
        reply = sent.reply
        if reply.error is not None:
            if isinstance(reply.error, DeadlineExceeded) and sent.bounded_s < sent.timeout_s:
                late = f"{self._service} did not answer within {sent.bounded_s:.0f} s"
                raise Unavailable(late, self._service)
            raise reply.error
        require_message(reply.message)
        if sent.origin.model_digest != self._description.model_digest:
            raise CorruptReply("it comes from a process of another model")
        try:
            return read(reply.message, sent.origin)
        except NonFiniteInput as error:
            raise NotFinite(str(error)) from None
        except MeshError as error:
            raise CorruptReply(str(error)) from None

    async def _called_over_link(self, method: str, request: Any, timeout_s: float) -> tuple[Any, Origin]:
        return await getattr(self._link_stub, method)(request, timeout_s), self._link.origin

    async def _called(self, method: str, request: Any, timeout_s: float) -> tuple[Any, Origin]:
        self._own_under_way += 1
        call = getattr(self._stub, method)(request, timeout=timeout_s, metadata=request_id.to_metadata())
        try:
            reply = await call
            return reply, Origin.of_metadata(await call.trailing_metadata())
        except grpc.aio.AioRpcError as error:
            raise from_call(error, self._service) from None
        except asyncio.CancelledError:
            raise self._unless_cancelled() from None
        finally:
            self._own_under_way -= 1

    def _unless_cancelled(self) -> BaseException:
        """What is to be raised for a call that was cancelled: by whoever waits, or as its channel was closed."""
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            return asyncio.CancelledError()
        return Unavailable(f"{self._service} does not answer", self._service)

    async def stream(
        self, method: str, request: Any, timeout_s: float, read: Callable[[Any], Iterable[ReplyT]]
    ) -> AsyncGenerator[ReplyT, None]:
        """Calls it once for a stream of replies; see `ReplicaSet.stream`.

        Raises:
            Unavailable: It is gone.
            CorruptReply: A reply cannot be right.
            MeshError: It refused the call.
        """
        self._own_under_way += 1
        call = getattr(self._stub, method)(request, timeout=timeout_s, metadata=request_id.to_metadata())
        try:
            async for reply in call:
                require_message(reply)
                origin = Origin.of_metadata(await call.initial_metadata())
                if origin.model_digest != self._description.model_digest:
                    raise CorruptReply("it comes from a process of another model")
                for item in read(reply):
                    yield item
        except grpc.aio.AioRpcError as error:
            raise from_call(error, self._service) from None
        except asyncio.CancelledError:
            raise self._unless_cancelled() from None
        finally:
            self._own_under_way -= 1
            call.cancel()  # a stream that nobody reads any more is not ended by itself


def require_message(reply: Any) -> None:
    """Raises CorruptReply for what gRPC gives, with status OK, for bytes that cannot be parsed."""
    if reply is None:
        raise CorruptReply("it cannot be parsed")
