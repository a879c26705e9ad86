from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.message import DecodeError

from expertmesh import wire
from expertmesh.rpc.channel import open_channel
from expertmesh.v1.expert_pb2 import ApplyRequest, ApplyResponse
from expertmesh.v1.expert_pb2_grpc import ExpertServiceStub
from expertmesh.v1.fault_pb2 import MisbehaveRequest, Misbehaviour
from expertmesh.v1.fault_pb2_grpc import FaultServiceStub, add_FaultServiceServicer_to_server
from services.expert.faults import FaultServicer, MisbehavingExpert
from services.expert.service import ExpertServicer
from tests import tiny

ROWS_ND = np.random.default_rng(0).normal(size=(5, 32)).astype(np.float32)
REQUEST = ApplyRequest(layer=0, experts=[1], counts=[5], rows=wire.encode(ROWS_ND))


class Expert:
    """An expert that misbehaves when it is asked to, and its replies as they come, unparsed."""

    def __init__(self, channel: Any) -> None:
        self.faults = FaultServiceStub(channel)
        self.honest = ExpertServiceStub(channel)
        self._raw = channel.unary_unary("/expertmesh.v1.ExpertService/Apply")

    async def asked(self, kind: str, **fields: Any) -> int:
        request = MisbehaveRequest(kind=Misbehaviour.Value(f"MISBEHAVIOUR_{kind}"), **fields)
        gone_wrong: int = (await self.faults.Misbehave(request)).gone_wrong
        return gone_wrong

    async def data(self, timeout_s: float = 10) -> bytes:
        data: bytes = await self._raw(REQUEST.SerializeToString(), timeout=timeout_s)
        return data

    async def reply(self) -> ApplyResponse:
        return ApplyResponse.FromString(await self.data())


@pytest.fixture
async def expert() -> AsyncIterator[Expert]:
    experts = ExpertServicer(tiny.stage("expert"), [(0, 1)])
    calls = MisbehavingExpert(experts)
    registrations = [
        (MisbehavingExpert.add_to_server, calls),
        (add_FaultServiceServicer_to_server, FaultServicer(experts.bank, calls)),
    ]
    async with (
        tiny.served(*registrations, address=f"unix:{tiny.scratch()}/expert.sock") as address,
        open_channel(address) as channel,
    ):
        yield Expert(channel)


async def test_a_fault_is_over_after_its_calls_and_was_counted(expert: Expert) -> None:
    right = await expert.reply()
    assert await expert.asked("WRONG_DIGEST", calls=2) == 0
    wrong = [await expert.reply() for _ in range(3)]
    assert [list(reply.digests) == list(right.digests) for reply in wrong] == [False, False, True]
    assert all(reply.rows == right.rows for reply in wrong)
    assert await expert.asked("UNSPECIFIED") == 2


async def test_rows_are_not_finite_or_too_few(expert: Expert) -> None:
    right = await expert.reply()
    await expert.asked("NAN_ROWS", calls=1)
    rows_ND = np.frombuffer((await expert.reply()).rows.data, np.float32).reshape(5, 32)
    assert np.isnan(rows_ND[0]).all()
    assert rows_ND[1:].tobytes() == right.rows.data[32 * 4 :]
    await expert.asked("WRONG_SHAPE", calls=1)
    reply = await expert.reply()
    assert list(reply.rows.shape) == [4, 32]
    assert reply.rows.data == right.rows.data[: -32 * 4]


async def test_bytes_are_cut_or_random(expert: Expert) -> None:
    right = await expert.data()
    await expert.asked("TRUNCATED", calls=1)
    assert await expert.data() == right[: len(right) // 2]
    await expert.asked("GARBAGE", calls=2)
    assert (await expert.data()) != (await expert.data())
    await expert.asked("TRUNCATED", calls=1)
    with pytest.raises(DecodeError):
        ApplyResponse.FromString(await expert.data())


async def test_a_call_fails_for_want_of_memory_and_its_caller_is_told_no_more_than_that(expert: Expert) -> None:
    await expert.asked("OUT_OF_MEMORY", calls=1)
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await expert.data()
    assert failed.value.code() is grpc.StatusCode.INTERNAL
    assert "on demand" not in failed.value.details()
    await expert.reply()


async def test_a_call_hangs_until_the_caller_leaves_or_it_is_taken_back(expert: Expert) -> None:
    right = await expert.data()
    await expert.asked("HANG", seconds=600.0)
    with pytest.raises(grpc.aio.AioRpcError) as late:
        await expert.data(timeout_s=0.2)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    hanging = asyncio.create_task(expert.data())
    while await expert.asked("HANG", seconds=600.0) < 2:
        await asyncio.sleep(0.01)
        hanging = asyncio.create_task(expert.data()) if hanging.done() else hanging
    await expert.asked("UNSPECIFIED")
    assert await hanging == right


async def test_a_slow_call_is_late_by_what_was_asked_for(expert: Expert) -> None:
    await expert.asked("SLOW", calls=1, delay_ms=300)
    started_s = asyncio.get_running_loop().time()
    await expert.reply()
    assert asyncio.get_running_loop().time() - started_s >= 0.3


@pytest.mark.parametrize("wrong", [{"kind": 99}, {"delay_ms": -1}, {"calls": -1}, {"seconds": -1.0}])
async def test_what_makes_no_sense_is_refused(expert: Expert, wrong: dict[str, Any]) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await expert.faults.Misbehave(MisbehaveRequest(**wrong))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
