"""Faults on demand, offered only with `--faults`: weights that change in memory, and replies that go wrong."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
from typing import Any

import grpc
import grpc.aio

from expertmesh.errors import InvalidInput, WrongPart
from expertmesh.v1.expert_pb2 import ApplyRequest, ApplyResponse
from expertmesh.v1.expert_pb2_grpc import ExpertServiceServicer
from expertmesh.v1.fault_pb2 import (
    MISBEHAVIOUR_GARBAGE,
    MISBEHAVIOUR_HANG,
    MISBEHAVIOUR_NAN_ROWS,
    MISBEHAVIOUR_OUT_OF_MEMORY,
    MISBEHAVIOUR_SLOW,
    MISBEHAVIOUR_TRUNCATED,
    MISBEHAVIOUR_UNSPECIFIED,
    MISBEHAVIOUR_WRONG_DIGEST,
    MISBEHAVIOUR_WRONG_SHAPE,
    ChangeWeightRequest,
    ChangeWeightResponse,
    MisbehaveRequest,
    MisbehaveResponse,
    Misbehaviour,
)
from expertmesh.v1.fault_pb2_grpc import FaultServiceServicer

from .bank import Bank

SERVICE = "expertmesh.v1.ExpertService"


class MisbehavingExpert(ExpertServiceServicer):
    """Stands before an honest servicer and lets some of its calls go wrong.

    Args:
        honest: What it passes calls on to.

    Attributes:
        gone_wrong: Calls that have.
    """

    def __init__(self, honest: ExpertServiceServicer) -> None:
        self._honest = honest
        self._asked = MisbehaveRequest()
        self._left, self._until_s = 0.0, math.inf
        self._changed = asyncio.Event()
        self.gone_wrong = 0

    def misbehave(self, request: MisbehaveRequest) -> None:
        """Has the next calls go wrong; those that hang go on."""
        self._asked = request
        self._left = request.calls if request.HasField("calls") else math.inf
        self._until_s = time.monotonic() + request.seconds if request.HasField("seconds") else math.inf
        self._changed.set()
        self._changed = asyncio.Event()

    async def Apply(self, request: ApplyRequest, context: grpc.aio.ServicerContext) -> ApplyResponse | bytes:
        """As the honest one, or not."""
        kind = self._next()
        if kind == MISBEHAVIOUR_SLOW:
            await asyncio.sleep(self._asked.delay_ms / 1e3)
        elif kind == MISBEHAVIOUR_HANG:
            await self._hang()
        elif kind == MISBEHAVIOUR_OUT_OF_MEMORY:
            raise MemoryError("on demand")
        reply = await self._honest.Apply(request, context)
        return _spoiled(kind, reply)

    def _next(self) -> Misbehaviour:
        """How the call that begins now goes wrong."""
        if self._asked.kind == MISBEHAVIOUR_UNSPECIFIED or self._left < 1 or time.monotonic() > self._until_s:
            return MISBEHAVIOUR_UNSPECIFIED
        self._left -= 1
        self.gone_wrong += 1
        return self._asked.kind

    async def _hang(self) -> None:
        until_s = self._until_s - time.monotonic()
        try:
            async with asyncio.timeout(None if until_s == math.inf else until_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def add_to_server(self, server: Any) -> None:
        """Offers it in place of the honest one, whose replies are always messages and never bytes."""
        handlers = {
            "Apply": grpc.unary_unary_rpc_method_handler(
                self.Apply, request_deserializer=ApplyRequest.FromString, response_serializer=_serialized
            )
        }
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        server.add_registered_method_handlers(SERVICE, handlers)


class FaultServicer(FaultServiceServicer):
    """Has experts go wrong.

    Args:
        bank: The experts.
        calls: Their calls.
    """

    def __init__(self, bank: Bank, calls: MisbehavingExpert) -> None:
        self._bank = bank
        self._calls = calls

    async def ChangeWeight(
        self, request: ChangeWeightRequest, context: grpc.aio.ServicerContext
    ) -> ChangeWeightResponse:
        """Changes one weight in memory."""
        expert = self._bank.pair2expert.get((request.layer, request.expert))
        if expert is None:
            raise WrongPart(f"this service does not hold expert {request.expert} of layer {request.layer}")
        weight = expert.down.dense_weight().clone()
        weight[divmod(int(weight.abs().argmax()), weight.shape[1])] += request.delta
        expert.down.change_weight(weight)
        return ChangeWeightResponse()

    async def Misbehave(self, request: MisbehaveRequest, context: grpc.aio.ServicerContext) -> MisbehaveResponse:
        """Has the next calls go wrong; tells how many have so far."""
        if request.kind not in Misbehaviour.values():
            raise InvalidInput("kind is not known", "kind")
        if request.delay_ms < 0 or request.calls < 0 or not 0 <= request.seconds <= 86400:
            raise InvalidInput("delay_ms, calls and seconds are not negative, and seconds at most a day", "until")
        self._calls.misbehave(request)
        return MisbehaveResponse(gone_wrong=self._calls.gone_wrong)


def _spoiled(kind: Misbehaviour, reply: ApplyResponse) -> ApplyResponse | bytes:
    """A reply after it has gone wrong; of those kinds that let the reply go right it is given as it is."""
    if kind == MISBEHAVIOUR_TRUNCATED:
        data = reply.SerializeToString()
        return data[: len(data) // 2]
    if kind == MISBEHAVIOUR_GARBAGE:
        return secrets.token_bytes(max(16, reply.ByteSize()))
    if kind == MISBEHAVIOUR_WRONG_DIGEST:
        reply.digests[:] = [bytes(byte ^ 0xFF for byte in digest) for digest in reply.digests]
    elif kind == MISBEHAVIOUR_NAN_ROWS:
        row_bytes = len(reply.rows.data) // reply.rows.shape[0]
        reply.rows.data = b"\xff" * row_bytes + reply.rows.data[row_bytes:]  # which is NaN in every dtype of rows
    elif kind == MISBEHAVIOUR_WRONG_SHAPE:
        row_bytes = len(reply.rows.data) // reply.rows.shape[0]
        reply.rows.shape[0] -= 1
        reply.rows.data = reply.rows.data[:-row_bytes]
    return reply


def _serialized(reply: ApplyResponse | bytes) -> bytes:
    return reply if isinstance(reply, bytes) else reply.SerializeToString()
