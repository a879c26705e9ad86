"""Calls to one replica, over its link or its channel; each is made once.

It does not know of other replicas; see `rpc.replicas.replica_set` for who is asked next.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable
from math import inf
from typing import Any, TypeVar

import grpc
import grpc.aio

from expertmesh.errors import CorruptReply, DeadlineExceeded, MeshError, NonFiniteInput, NotFinite, Unavailable
from expertmesh.rpc import request_id
from expertmesh.rpc.errors import from_call
from expertmesh.rpc.link.channel import LinkChannel
from expertmesh.rpc.origin import Origin
from expertmesh.v1.description_pb2 import DescribeResponse

ReplyT = TypeVar("ReplyT")

ATTEMPT_TIMEOUT_S = 10.0  # a replica that takes longer is given up, whatever time the caller has


class Caller:
    """Makes calls to one replica.

    Args:
        service: Name of the service.
        channel: A channel to it.
        stub: Makes the generated stub of its gRPC service for a channel.
        link: What takes the place of the channel for the unary calls of a process that offers it.

    Attributes:
        calls_under_way: Calls that have not ended.
    """

    def __init__(self, service: str, channel: grpc.aio.Channel, stub: Callable[[Any], Any], link: LinkChannel) -> None:
        self._service = service
        self._channel, self._link = channel, link
        self._stub, self._link_stub = stub(channel), stub(link)
        self._description, self._links = DescribeResponse(), False
        self.calls_under_way = 0

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

    async def attempt(
        self,
        method: str,
        request: Any,
        timeout_s: float,
        read: Callable[[Any, Origin], ReplyT],
        patience_s: float = inf,
    ) -> ReplyT:
        """Calls it once; see `ReplicaSet.call`.

        Raises:
            Unavailable: It is gone, or took longer than `patience_s` or `ATTEMPT_TIMEOUT_S`.
            CorruptReply: Its reply cannot be right.
            MeshError: It refused the call.
        """
        self.calls_under_way += 1
        bounded_s = min(timeout_s, patience_s, ATTEMPT_TIMEOUT_S)
        try:
            if self._links:
                reply = await getattr(self._link_stub, method)(request, bounded_s)
                origin = self._link.origin
            else:
                reply, origin = await self._called(method, request, bounded_s)
        except DeadlineExceeded:
            if timeout_s <= bounded_s:
                raise
            late = f"{self._service} did not answer within {bounded_s:.0f} s"
            raise Unavailable(late, self._service) from None
        finally:
            self.calls_under_way -= 1
        require_message(reply)
        if origin.model_digest != self._description.model_digest:
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
            raise from_call(error, self._service) from None
        except asyncio.CancelledError:
            raise self._unless_cancelled() from None

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
        self.calls_under_way += 1
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
            self.calls_under_way -= 1
            call.cancel()  # a stream that nobody reads any more is not ended by itself


def require_message(reply: Any) -> None:
    """Raises CorruptReply for what gRPC gives, with status OK, for bytes that cannot be parsed."""
    if reply is None:
        raise CorruptReply("it cannot be parsed")
