from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import grpc
import pytest

from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.inference_pb2 import ClassifyRequest, GenerateRequest
from expertmesh.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from expertmesh.v1.sampling_pb2 import TokenLogprobs
from tests import tiny
from tests.chaos.load import Load, Rate
from tests.chaos.samples import Samples, classified_bits, token_bits

CLASSIFY = Samples("classify", (ClassifyRequest(texts=["a"]), ClassifyRequest(texts=["b"])), 2)
GENERATE = Samples("generate", (GenerateRequest(text="a"),), 1)
REPLY = pb.ClassifyResponse(results=[pb.Classification(label="x", logits=[1, 2], route=pb.ROUTE_MESH, exact=True)])


class Answering(InferenceServiceServicer):
    """Hangs, refuses or answers, by the contract that is asked for."""

    async def Classify(self, request: ClassifyRequest, context: Any) -> pb.ClassifyResponse:
        if request.contract == pb.CONTRACT_MESH_ONLY:
            await asyncio.sleep(600)
        if request.contract == pb.CONTRACT_DEGRADED_OK:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no")
        return REPLY

    async def Generate(self, request: GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        yield message(1, pb.ROUTE_MESH)
        if request.contract == pb.CONTRACT_MESH_ONLY:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no more")
        await asyncio.sleep(0.3)
        yield message(2, pb.ROUTE_FULL_MODEL, finish_reason=pb.FINISH_REASON_LENGTH)


def message(token: int, route: pb.Route, **fields: Any) -> pb.GenerateResponse:
    return pb.GenerateResponse(tokens=[TokenLogprobs(id=token)], route=route, exact=True, **fields)


@pytest.fixture
async def address() -> AsyncIterator[str]:
    async with tiny.served(
        (add_InferenceServiceServicer_to_server, Answering()), address=f"unix:{tiny.scratch()}/gateway.sock"
    ) as address:
        yield address


async def test_requests_are_sent_by_the_clock_although_none_is_answered(address: str) -> None:
    async with Load(CLASSIFY, lambda: [address], Rate(50.0, 1.0, (("MESH_ONLY", 1),))) as load:
        while load.sent < 20:
            await asyncio.sleep(0.01)
    assert {record.code for record in load.records} == {"DEADLINE_EXCEEDED"}
    assert sorted(record.number for record in load.records) == list(range(load.sent))
    due_s = [record.due_s for record in sorted(load.records, key=lambda record: record.number)]
    assert all(later - sooner == pytest.approx(0.02) for sooner, later in pairwise(due_s))
    first_end_s = min(record.end_s for record in load.records)
    assert sum(record.start_s < first_end_s for record in load.records) >= 10


async def test_an_answer_and_a_failure_are_recorded_as_they_came(address: str) -> None:
    contracts = (("EXACT", 1), ("DEGRADED_OK", 1))
    async with Load(CLASSIFY, lambda: [address], Rate(50.0, 5.0, contracts)) as load:
        await load.at_least(20)
    answered = [record for record in load.records if record.contract == "EXACT"]
    refused = [record for record in load.records if record.contract == "DEGRADED_OK"]
    assert answered
    assert refused
    assert {(one.code, one.answer, one.routes, one.exact, one.finishes) for one in answered} == {
        ("OK", classified_bits(REPLY), ("MESH",), True, 1)
    }
    assert {(one.code, one.reason["text"], one.answer) for one in refused} == {("UNAVAILABLE", "no", b"")}


async def test_a_stream_is_recorded_with_its_routes_and_its_longest_stall(address: str) -> None:
    async with Load(GENERATE, lambda: [address], Rate(20.0, 5.0)) as load:
        await load.at_least(3)
    both = token_bits(message(1, pb.ROUTE_MESH)) + token_bits(message(2, pb.ROUTE_FULL_MODEL))
    for record in load.records:
        assert (record.code, record.answer, record.routes, record.finishes) == ("OK", both, ("MESH", "FULL_MODEL"), 1)
        assert 0.2 <= record.stall_s < 5  # of 0.3 s, less what the first message was late


async def test_what_a_broken_stream_has_said_is_kept(address: str) -> None:
    async with Load(GENERATE, lambda: [address], Rate(20.0, 5.0, (("MESH_ONLY", 1),))) as load:
        await load.at_least(3)
    seen = {(record.code, record.answer, record.finishes) for record in load.records}
    assert seen == {("UNAVAILABLE", token_bits(message(1, pb.ROUTE_MESH)), 0)}


async def test_while_it_is_paused_only_bursts_are_sent(address: str) -> None:
    async with Load(CLASSIFY, lambda: [address], Rate(50.0, 5.0)) as load:
        await load.at_least(1)
        load.is_paused = True
        while load.under_way:
            await asyncio.sleep(0.01)
        before = load.sent
        load.burst(7)
        await load.at_least(7)
        assert load.sent == before + 7
