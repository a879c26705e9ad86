from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from typing import Any

import grpc
import grpc.aio
import pytest

from expertmesh.errors import (
    CorruptReply,
    DeadlineExceeded,
    InvalidInput,
    MeshError,
    Overloaded,
    Unavailable,
    WrongPart,
)
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.errors import error_info
from expertmesh.rpc.guard import Guard
from expertmesh.rpc.interceptor import CallInterceptor
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas.replica import State
from expertmesh.rpc.replicas.replica_set import ReplicaSet
from expertmesh.telemetry import metrics
from expertmesh.v1.description_pb2 import DescribeResponse
from expertmesh.v1.description_pb2_grpc import DescriptionServiceServicer, add_DescriptionServiceServicer_to_server
from expertmesh.v1.inference_pb2 import GenerateRequest, GenerateResponse
from expertmesh.v1.inference_pb2_grpc import (
    InferenceServiceServicer,
    InferenceServiceStub,
    add_InferenceServiceServicer_to_server,
)

METHOD = "/expertmesh.v1.InferenceService/Generate"
DIGEST = "d" * 64


class Talker(InferenceServiceServicer, DescriptionServiceServicer):
    """Says numbers for ever, or does what it is told before one of them.

    Args:
        at: Before which number.
        does: What happens then.
    """

    def __init__(self, at: int = -1, does: Callable[[Any], Any] | None = None) -> None:
        self.at, self.does = at, does
        self.open = 0
        self.closed = asyncio.Event()

    async def Describe(self, request: Any, context: Any) -> DescribeResponse:
        return DescribeResponse(kind="full_model", model_digest=DIGEST)

    async def Generate(self, request: GenerateRequest, context: Any) -> AsyncIterator[GenerateResponse]:
        self.open += 1
        try:
            number = 0
            while True:
                if number == self.at and self.does is not None and (await self.does(context)) == "end":
                    return
                yield GenerateResponse(text=str(number))
                number += 1
                await asyncio.sleep(0)
        finally:
            self.open -= 1
            self.closed.set()


async def end(context: Any) -> str:
    return "end"


async def hang(context: Any) -> None:
    await asyncio.Event().wait()


def raising(error: BaseException) -> Callable[[Any], Any]:
    async def does(context: Any) -> None:
        raise error

    return does


@asynccontextmanager
async def served(talker: Talker, digest: str = DIGEST) -> AsyncIterator[str]:
    """Behind the product's interceptor."""
    guard = Guard()
    guard.origin = Origin(digest, "cpu").to_metadata()
    server = grpc.aio.server(interceptors=[CallInterceptor(guard)], options=(("grpc.so_reuseport", 0),))
    add_InferenceServiceServicer_to_server(talker, server)
    add_DescriptionServiceServicer_to_server(talker, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(None)


async def collect(call: Any, texts: list[str]) -> None:
    async for message in call:
        texts.append(message.text)


def counted(code: str) -> float:
    return metrics.REGISTRY.get_sample_value("expertmesh_requests_total", {"method": METHOD, "code": code}) or 0.0


# The server's side.


@pytest.mark.parametrize("at", [0, 3])
@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidInput("bad", "field"), grpc.StatusCode.INVALID_ARGUMENT),
        (WrongPart("wrong"), grpc.StatusCode.FAILED_PRECONDITION),
        (Overloaded("full"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unavailable("gone", "gating"), grpc.StatusCode.UNAVAILABLE),
        (DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (CorruptReply("nonsense"), grpc.StatusCode.DATA_LOSS),
        (TimeoutError(), grpc.StatusCode.DEADLINE_EXCEEDED),
        (RuntimeError("secret"), grpc.StatusCode.INTERNAL),
        (MeshError("secret"), grpc.StatusCode.INTERNAL),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_an_error_ends_a_stream_by_its_status_behind_what_came_before(
    at: int, error: Exception, code: grpc.StatusCode, capfd: pytest.CaptureFixture[str]
) -> None:
    before = counted(code.name)
    texts: list[str] = []

    def ask(address: str) -> tuple[Any, Origin]:
        """As a caller without grpc.aio, which forgot what came before a status alone in 1 of 3,000 calls."""
        with grpc.insecure_channel(address) as channel:
            call = InferenceServiceStub(channel).Generate(GenerateRequest(), timeout=10)
            with pytest.raises(grpc.RpcError) as caught:
                texts.extend(message.text for message in call)
            return caught.value, Origin.of_metadata(call.initial_metadata())

    async with served(Talker(at, raising(error))) as address:
        caught, origin = await asyncio.to_thread(ask, address)
    assert origin == Origin(DIGEST, "cpu")
    assert texts == [str(number) for number in range(at)]
    assert caught.code() == code
    assert "secret" not in (caught.details() or "")
    if code not in (grpc.StatusCode.INTERNAL,):
        assert error_info(caught)["reason"]
    assert counted(code.name) == before + 1


async def test_a_stream_that_ends_well_is_counted_as_such() -> None:
    before = counted("OK")
    async with served(Talker(2, end)) as address, grpc.aio.insecure_channel(address) as channel:
        texts = [
            message.text async for message in InferenceServiceStub(channel).Generate(GenerateRequest(), timeout=10)
        ]
    assert texts == ["0", "1"]
    assert counted("OK") == before + 1


@pytest.mark.parametrize("how", ["cancel", "channel", "deadline"])
@pytest.mark.parametrize("at", [0, 3, 10**9], ids=["before the first", "hanging", "talking"])
async def test_a_stream_that_is_left_is_closed(how: str, at: int) -> None:
    talker = Talker(at, hang)
    before = counted("CANCELLED")
    async with served(talker) as address, grpc.aio.insecure_channel(address) as channel:
        call = InferenceServiceStub(channel).Generate(GenerateRequest(), timeout=0.3 if how == "deadline" else 10)
        if at:
            assert (await call.read()).text == "0"
        else:
            while not talker.open:
                await asyncio.sleep(0)
        if how == "cancel":
            call.cancel()
        elif how == "channel":
            await channel.close()
        async with asyncio.timeout(5):
            await talker.closed.wait()
    assert talker.open == 0
    assert counted("CANCELLED") == before + 1


@pytest.mark.parametrize("data", [b"\xff", b"\x0a\x02\xff\xfe"])
async def test_a_request_that_cannot_be_parsed_is_invalid_and_begins_nothing(data: bytes) -> None:
    talker = Talker()
    async with served(talker) as address, grpc.aio.insecure_channel(address) as channel:
        with pytest.raises(grpc.aio.AioRpcError, match="cannot be parsed") as caught:
            async for _ in channel.unary_stream(METHOD)(data, timeout=10):
                pass
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert not talker.closed.is_set()


# The client's side.


@asynccontextmanager
async def replicas(*addresses: str) -> AsyncIterator[ReplicaSet]:
    """Replicas of which all but the dead ones are live."""
    replica_set = ReplicaSet(
        "full_model", addresses, open_channel, InferenceServiceStub, lambda description: None, lambda event: None
    )
    async with replica_set:
        async with asyncio.timeout(10):
            while len(replica_set.live) < len(addresses):
                await asyncio.sleep(0.01)
        yield replica_set


def listen(replica_set: ReplicaSet, read: Any = None, timeout_s: float = 10) -> AsyncGenerator[str, None]:
    def texts(reply: GenerateResponse) -> list[str]:
        return [reply.text]

    return replica_set.stream("Generate", GenerateRequest(), Deadline.after(timeout_s), read or texts)


async def heard(replica_set: ReplicaSet, **options: Any) -> list[str]:
    async with aclosing(listen(replica_set, **options)) as texts:
        return [text async for text in texts]


async def test_a_stream_that_is_closed_is_cancelled_at_the_replica() -> None:
    talker = Talker()
    async with served(talker) as address, replicas(address) as replica_set:
        async with aclosing(listen(replica_set)) as texts:
            assert [await anext(texts) for _ in range(3)] == ["0", "1", "2"]
            assert replica_set.replicas[0].calls_under_way == 1
        assert replica_set.replicas[0].calls_under_way == 0
        async with asyncio.timeout(5):
            await talker.closed.wait()
        assert replica_set.replicas[0].state is State.LIVE


async def test_streams_go_to_whoever_has_the_fewest_calls() -> None:
    talkers = [Talker(), Talker(), Talker()]
    async with AsyncExitStack() as stack:
        addresses = [await stack.enter_async_context(served(talker)) for talker in talkers]
        replica_set = await stack.enter_async_context(replicas(*addresses))
        for _ in range(6):
            texts = await stack.enter_async_context(aclosing(listen(replica_set)))
            await anext(texts)
        assert [talker.open for talker in talkers] == [2, 2, 2]


@pytest.mark.parametrize(
    ("does", "error", "state"),
    [
        (raising(Unavailable("gone", "x")), Unavailable, State.CONNECTING),
        (raising(RuntimeError("a defect")), CorruptReply, State.EJECTED),
        (raising(CorruptReply("nonsense")), CorruptReply, State.EJECTED),
        (raising(Overloaded("full")), Overloaded, State.LIVE),
        (raising(InvalidInput("bad")), InvalidInput, State.LIVE),
        (hang, DeadlineExceeded, State.LIVE),
    ],
)
async def test_what_ends_a_stream_is_told_and_remembered(
    does: Any, error: type[MeshError], state: State, capfd: pytest.CaptureFixture[str]
) -> None:
    async with served(Talker(2, does)) as address, replicas(address) as replica_set:
        with pytest.raises(error):
            await heard(replica_set, timeout_s=0.5)
        assert replica_set.replicas[0].state is state
        assert replica_set.replicas[0].calls_under_way == 0


async def test_a_reply_that_cannot_be_right_ends_a_stream() -> None:
    def read(reply: GenerateResponse) -> list[str]:
        raise CorruptReply("no")

    talker = Talker()
    async with served(talker) as address, replicas(address) as replica_set:
        with pytest.raises(CorruptReply, match="full_model gave a reply that cannot be right: no"):
            await heard(replica_set, read=read)
        async with asyncio.timeout(5):
            await talker.closed.wait()


async def test_a_stream_of_another_model_is_refused() -> None:
    async with served(Talker(), digest="another") as address, replicas(address) as replica_set:
        with pytest.raises(CorruptReply, match="another model"):
            await heard(replica_set)


async def test_without_a_live_replica_it_is_said_at_once() -> None:
    async with served(Talker()) as address, replicas(address) as replica_set:
        replica_set.replicas[0].lose("for a test")
        with pytest.raises(Unavailable, match="no replica of full_model answers"):
            await heard(replica_set)


async def test_nobody_is_asked_when_the_time_is_over() -> None:
    talker = Talker()
    async with served(talker) as address, replicas(address) as replica_set:
        with pytest.raises(DeadlineExceeded):
            await heard(replica_set, timeout_s=0)
    assert not talker.closed.is_set()
