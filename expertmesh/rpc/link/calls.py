"""The calls of one link, at the side that serves them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from contextvars import copy_context
from functools import partial
from time import monotonic
from typing import Any

import grpc

from expertmesh.errors import InvalidInput
from expertmesh.rpc.guard import Failure
from expertmesh.rpc.interceptor import parsed
from expertmesh.rpc.link.frames import Connection
from expertmesh.v1.description_pb2 import DescribeResponse
from expertmesh.v1.link_pb2 import LinkRequest, LinkResponse

MOST_CALLS = 1024  # under way on one link
Finish = Callable[["asyncio.Future[Any]"], "bytes | Failure"]
Start = Callable[[LinkRequest, Any, bool], "tuple[asyncio.Future[Any], Finish]"]


class Calls:
    """The calls of one link; `taken` counts them.

    Args:
        path2handler: The methods there are.
        start: Starts a call; is given what the message holds, or the error that it could not be read, and whether no
            other call can have come.
        others_are_quiet: Whether, at a time of `time.monotonic`, no other link brings calls.

    Attributes:
        taken_s: When the last call came.
    """

    def __init__(
        self,
        path2handler: Mapping[str, grpc.RpcMethodHandler],
        start: Start,
        others_are_quiet: Callable[[Calls, float], bool],
    ) -> None:
        self._path2handler, self._start, self._others_are_quiet = path2handler, start, others_are_quiet
        self._under_way: dict[int, asyncio.Future[Any]] = {}
        self._settling = False
        self.connection: Connection | None = None
        self.taken = 0
        self.taken_s = 0.0

    @property
    def is_busy(self) -> bool:
        """Whether calls are under way."""
        return bool(self._under_way)

    def introduce(self, description: DescribeResponse) -> None:
        """Says who is here; again, when that has changed."""
        if self.connection is not None:
            self.connection.send(LinkResponse(), description.SerializeToString())

    def take(self, request: LinkRequest, message: bytes | memoryview) -> None:
        """Starts a call, or cancels one."""
        under_way = self._under_way.get(request.call)
        if not request.method or under_way is not None:
            if under_way is not None:
                under_way.cancel()
        elif self._settling:
            self._send(request.call, _refusal(grpc.StatusCode.UNAVAILABLE, "it is stopping"))
        elif len(self._under_way) >= MOST_CALLS:
            self._send(request.call, _refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at once"))
        elif (handler := self._path2handler.get(request.method)) is None:
            self._send(request.call, _refusal(grpc.StatusCode.UNIMPLEMENTED, "there is no such method"))
        else:
            try:
                read = parsed(message, handler.request_deserializer)
            except InvalidInput as error:
                read = error
            self.taken += 1
            self.taken_s = monotonic()
            has_more = self.connection is None or self.connection.has_more
            is_alone = not has_more and self._others_are_quiet(self, self.taken_s)
            context = copy_context()  # a call's own, as a task has
            under_way, finish = context.run(self._start, request, read, is_alone)
            self.taken_s = monotonic()  # it may be computed by now, during which others could bring nothing
            if under_way.done():
                context.run(self._answer, request.call, finish, under_way)
                return
            self._under_way[request.call] = under_way
            under_way.add_done_callback(partial(self._served, request.call, finish), context=context)

    def settle(self) -> None:
        """Ends the link as soon as no call is under way."""
        self._settling = True
        if not self._under_way and self.connection is not None:
            self.connection.finish()

    def cut_off(self) -> None:
        """Ends the link and what is under way on it."""
        if self.connection is not None:
            self.connection.close()
        self.end()

    def end(self) -> None:
        """Cancels what is under way, since nobody is there to hear of it."""
        self.connection = None
        for under_way in list(self._under_way.values()):
            under_way.cancel()

    def _served(self, call: int, finish: Finish, ended: asyncio.Future[Any]) -> None:
        del self._under_way[call]
        self._answer(call, finish, ended)
        if self._settling:
            self.settle()

    def _answer(self, call: int, finish: Finish, ended: asyncio.Future[Any]) -> None:
        try:
            self._send(call, finish(ended))
        except asyncio.CancelledError:
            self._send(call, _refusal(grpc.StatusCode.CANCELLED, "it was cancelled"))

    def _send(self, call: int, outcome: bytes | Failure) -> None:
        if self.connection is None:
            return
        if isinstance(outcome, Failure):
            code: int = outcome.code.value[0]
            self.connection.send(LinkResponse(call=call, code=code, text=outcome.text, details=outcome.details), b"")
        else:
            self.connection.send(LinkResponse(call=call), outcome)


def _refusal(code: grpc.StatusCode, text: str) -> Failure:
    return Failure(code, text)
