from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import pytest

from expertmesh.client import Client
from expertmesh.rpc.errors import error_info
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.inference_pb2_grpc import InferenceServiceStub
from expertmesh.v1.tokenizer_pb2 import Chat, ChatMessage
from tests.generating import CONTEXT, VOCAB, answer_of, asked, metrics_of, model, streamed, until, used_blocks
from tests.up import Up

INVALID = grpc.StatusCode.INVALID_ARGUMENT
WRONG_KIND = grpc.StatusCode.FAILED_PRECONDITION
GENERATE = "/expertmesh.v1.InferenceService/Generate"
FAST_S = 2.0


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with Up(model(), "--expert-services", "1", "--no-restart") as running:
        yield running


def changed(**fields: Any) -> pb.GenerateRequest:
    return asked(4, **{"max_tokens": 3, **fields})


BAD: dict[str, tuple[pb.GenerateRequest, str]] = {
    "no prompt": (pb.GenerateRequest(max_tokens=1), "no prompt"),
    "no ids": (asked([], 1), "the prompt is empty"),
    "empty text": (pb.GenerateRequest(text=""), "the prompt is empty"),
    "no messages": (pb.GenerateRequest(chat=Chat()), "chat.messages"),
    "prompt as long as the context": (asked(CONTEXT, 1), "at most 511"),
    "prompt beyond the context": (asked(100_000, 1), "at most 511"),
    "text beyond the context": (
        pb.GenerateRequest(text="many words " * 2000, max_tokens=1),
        "at most 17408 go with a context of 512",
    ),
    "text beyond everything": (pb.GenerateRequest(text="x" * (2**20 + 1)), "bytes of UTF-8"),
    "id of no token": (asked([5, VOCAB, 6], 1), "ids[1] = 512"),
    "negative id": (asked([-1], 1), "ids[0] = -1"),
    "max_tokens 0": (changed(max_tokens=0), "max_tokens"),
    "max_tokens -1": (changed(max_tokens=-1), "max_tokens"),
    "max_tokens -2^31": (changed(max_tokens=-(2**31)), "max_tokens"),
    "temperature NaN": (changed(temperature=math.nan), "temperature"),
    "temperature -1": (changed(temperature=-1), "temperature"),
    "temperature 1e30": (changed(temperature=1e30), "temperature"),
    "temperature inf": (changed(temperature=math.inf), "temperature"),
    "top_p 0": (changed(top_p=0), "top_p"),
    "top_p 2": (changed(top_p=2), "top_p"),
    "top_p NaN": (changed(top_p=math.nan), "top_p"),
    "top_k -1": (changed(top_k=-1), "top_k"),
    "min_p -1": (changed(min_p=-0.5), "min_p"),
    "min_p 2": (changed(min_p=2), "min_p"),
    "penalty 0": (changed(repetition_penalty=0), "repetition_penalty"),
    "penalty NaN": (changed(repetition_penalty=math.nan), "repetition_penalty"),
    "n 0": (changed(n=0), "n must be"),
    "n 17": (changed(n=17), "n must be"),
    "n 2^31-1": (changed(n=2**31 - 1), "n must be"),
    "choices beyond the last": (changed(n=2, first_choice=15), "first_choice"),
    "negative choice": (changed(first_choice=-1), "first_choice"),
    "logprobs 21": (changed(logprobs=21), "logprobs"),
    "logprobs -1": (changed(logprobs=-1), "logprobs"),
    "empty stop": (changed(stop=["a", ""]), "stop[1]"),
    "long stop": (changed(stop=["x" * 257]), "stop[0]"),
    "17 stops": (changed(stop=["x"] * 17), "at most 16"),
    "10^6 stops": (changed(stop=["stop"] * 10**6), "at most 16"),
    "65 stop ids": (changed(stop_ids=[1] * 65), "at most 64"),
    "10^6 stop ids": (changed(stop_ids=[1] * 10**6), "at most 64"),
    "stop id of no token": (changed(stop_ids=[VOCAB]), "stop_ids[0]"),
    "unknown contract": (changed(contract=17), "contract"),
    "unknown route": (changed(route=17), "route"),
    "route degraded": (changed(route=pb.ROUTE_DEGRADED), "route"),
    "mesh only by the full model": (changed(contract=pb.CONTRACT_MESH_ONLY, route=pb.ROUTE_FULL_MODEL), "MESH_ONLY"),
    "a chat without a template": (
        pb.GenerateRequest(chat=Chat(messages=[ChatMessage(role="user", content="hi")]), max_tokens=1),
        "template",
    ),
}


async def refused(call: Any, request: Any) -> grpc.aio.AioRpcError:
    begun_s = time.monotonic()
    error = await answered(call, request)
    assert isinstance(error, grpc.aio.AioRpcError)
    assert time.monotonic() - begun_s < FAST_S
    return error


async def answered(call: Any, request: Any) -> grpc.aio.AioRpcError | None:
    """The status of a call, if it is an error."""
    reply = call(request, timeout=20)
    try:
        if hasattr(reply, "__aiter__"):
            async for _ in reply:
                pass
        else:
            await reply
    except grpc.aio.AioRpcError as error:
        return error
    return None


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("whole", [False, True], ids=["stream", "whole"])
async def test_bad_requests_are_refused_by_name(up: Up, name: str, whole: bool) -> None:
    request, what = BAD[name]
    async with grpc.aio.insecure_channel(up.grpc) as channel:
        stub = InferenceServiceStub(channel)
        if whole:
            error = await refused(stub.Complete, pb.CompleteRequest(request=request))
        else:
            error = await refused(stub.Generate, request)
    assert error.code() == INVALID
    assert what in (error.details() or "")
    assert error_info(error)["reason"] == "INVALID_INPUT"


@pytest.mark.parametrize("name", ["prompt beyond the context", "temperature NaN", "n 17", "10^6 stops"])
async def test_the_full_model_by_itself_refuses_the_same(up: Up, name: str) -> None:
    request, what = BAD[name]
    async with grpc.aio.insecure_channel(up.processes()["full_model.0"]["address"]) as channel:
        error = await refused(InferenceServiceStub(channel).Generate, request)
    assert error.code() == INVALID
    assert what in (error.details() or "")


@pytest.mark.parametrize(
    "data",
    [
        b"garbage",
        b"\x0a\x02\xff\xfe",
        b"\x0a\xff",
        asked(3, 1).SerializeToString() + b"\x20\x80\x80\x80\x80\x08",
        asked(3, 1).SerializeToString()[:-1],
    ],
    ids=["garbage", "not UTF-8", "cut short", "max_tokens 2^31", "cut at the end"],
)
async def test_damaged_requests_are_invalid(up: Up, data: bytes) -> None:
    async with grpc.aio.insecure_channel(up.grpc) as channel:
        error = await refused(channel.unary_stream(GENERATE), data)
    assert error.code() == INVALID
    assert "Traceback" not in (error.details() or "")


async def test_all_bad_requests_at_once_harm_no_bystander(up: Up) -> None:
    request = asked(60, 200, temperature=1.0, seed=8)
    async with Client(up.grpc) as client, grpc.aio.insecure_channel(up.grpc) as channel:
        expected = answer_of(await streamed(client, request))
        running = asyncio.create_task(streamed(client, request))
        stub = InferenceServiceStub(channel)
        errors = await asyncio.gather(*(answered(stub.Generate, bad) for bad, _ in BAD.values()))
        assert {error and error.code() for error in errors} == {INVALID}
        assert answer_of(await running) == expected


async def test_a_model_that_generates_does_not_classify(up: Up) -> None:
    async with grpc.aio.insecure_channel(up.grpc) as channel:
        error = await refused(InferenceServiceStub(channel).Classify, pb.ClassifyRequest(texts=["a"]))
    assert error.code() == WRONG_KIND
    assert "use Generate" in (error.details() or "")


async def test_a_model_that_classifies_does_not_generate(mesh: Up) -> None:
    async with grpc.aio.insecure_channel(mesh.grpc) as channel:
        stub = InferenceServiceStub(channel)
        for call, request in (
            (stub.Generate, asked(3, 1)),
            (stub.Complete, pb.CompleteRequest(request=asked(3, 1))),
            (stub.Tokenize, pb.TokenizeRequest(text="a")),
        ):
            error = await refused(call, request)
            assert error.code() == WRONG_KIND
            assert "use Classify" in (error.details() or "")


async def test_the_largest_requests_are_served(up: Up) -> None:
    async with Client(up.grpc) as client:
        whole = await client.complete(asked(CONTEXT - 1, 2**31 - 1))
        assert len(whole.choices[0].tokens) == 1
        assert whole.choices[0].finish_reason == pb.FINISH_REASON_LENGTH
        many = await client.complete(
            asked(
                3,
                2,
                n=16,
                temperature=100,
                logprobs=20,
                stop=["\x00" * 256] * 16,
                stop_ids=range(3, 67),
                top_k=2**31 - 1,
            )
        )
        assert len(many.choices) == 16
        assert {len(token.top) for choice in many.choices for token in choice.tokens} == {20}
        unbounded = pb.GenerateRequest(ids=pb.TokenIds(ids=[7] * (CONTEXT - 20)), temperature=0, ignore_end=True)
        assert len((await client.complete(unbounded)).choices[0].tokens) == 20


async def test_too_many_that_wait_are_refused_with_a_hint_and_the_rest_is_served() -> None:
    environment = {
        "EXPERTMESH_KV_TOKENS": str(CONTEXT),
        "EXPERTMESH_WAITING_TEXTS": "3",
        "EXPERTMESH_SIMULATE_STEP_MS": "5",  # so that the holder is not done before all have been looked at
    }
    with Up(model(), "--expert-services", "1", "--no-restart", environment=environment) as up:
        async with Client(up.grpc) as client:
            request = asked(100, 400, n=1)  # fills the cache by itself
            holder = asyncio.create_task(streamed(client, request))
            await until(lambda: _holds(up))
            waiting = [asyncio.create_task(client.complete(asked(number, 3))) for number in (5, 6, 7)]

            async def all_wait() -> bool:
                return (await metrics_of(up, "gateway.0"))['expertmesh_generations{state="waiting"}'] == 3

            await until(all_wait)
            async with grpc.aio.insecure_channel(up.grpc) as channel:
                error = await refused(InferenceServiceStub(channel).Generate, request)
            assert error.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
            assert b"RetryInfo" in dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
            assert not any(task.done() for task in waiting)
            holder.cancel()
            assert [len(reply.choices[0].tokens) for reply in await asyncio.gather(*waiting)] == [3, 3, 3]


async def _holds(up: Up) -> bool:
    return await used_blocks(up, "gating.0") == 4
