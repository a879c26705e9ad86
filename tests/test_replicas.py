from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial
from time import monotonic
from typing import Any

import grpc
import pytest

from expertmesh.errors import CorruptReply, DeadlineExceeded, InvalidInput, NotFinite, Unavailable, WrongPart
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.replicas import replica as module
from expertmesh.rpc.replicas.admission import require_parts
from expertmesh.rpc.replicas.replica import State
from expertmesh.rpc.replicas.replica_set import ReplicaSet
from expertmesh.v1.description_pb2 import DescribeResponse, Part
from expertmesh.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests import tiny
from tests.doubles.corrupt import Corrupt
from tests.doubles.garbling import Garbling
from tests.doubles.hanging import Hanging
from tests.doubles.honest import DIGEST, Honest
from tests.doubles.refusing import Refusing
from tests.replica_sets import WAIT_S, Events, ask, replica_set, served


@contextmanager
def within(seconds: float) -> Iterator[None]:
    started_s = monotonic()
    yield
    assert monotonic() - started_s < seconds


async def test_a_replica_is_called() -> None:
    async with served(Honest(3.0)) as addresses, replica_set(*addresses) as (replicas, events):
        assert await ask(replicas) == 3.0
        assert [event.what for event in events.seen] == ["live"]
        assert replicas.live[0].description.parts[0].digest == DIGEST


async def test_the_replica_with_the_fewest_calls_gets_the_next() -> None:
    doubles = [Honest(1.0), Honest(2.0), Honest(3.0)]
    for double in doubles:
        double.go_on.clear()
    async with served(*doubles) as addresses, replica_set(*addresses) as (replicas, _):
        tasks = [asyncio.create_task(ask(replicas)) for _ in range(9)]
        for double in doubles:
            await double.arrived.wait()
        assert [replica.calls_under_way for replica in replicas.replicas] == [3, 3, 3]
        doubles[1].go_on.set()
        async with asyncio.timeout(WAIT_S):
            done = set()
            while len(done) < 3:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                tasks = [task for task in tasks if task not in done] if len(done) == 3 else tasks
        assert {task.result() for task in done} == {2.0}
        assert await asyncio.gather(*(ask(replicas) for _ in range(2))) == [2.0, 2.0]
        for double in doubles:
            double.go_on.set()
        await asyncio.gather(*tasks)
        assert [replica.calls_under_way for replica in replicas.replicas] == [0, 0, 0]


async def test_a_killed_replicas_calls_go_to_another() -> None:
    doomed, other = Honest(1.0), Honest(2.0)
    doomed.go_on.clear()
    async with served(other) as (second,), AsyncExitStack() as life:
        first = await life.enter_async_context(doomed.served())
        async with replica_set(first, second) as (replicas, events):
            tasks = [asyncio.create_task(ask(replicas)) for _ in range(6)]
            await doomed.arrived.wait()
            await life.aclose()
            assert await asyncio.gather(*tasks) == [2.0] * 6
            assert events.count("lost", first) >= 1
            assert events.count("retried", second) >= 1
            assert [replica.address for replica in replicas.live] == [second]


async def test_a_replica_that_says_unavailable_is_left_for_another() -> None:
    refusing, other = Refusing(), Honest(2.0)
    async with served(refusing, other) as addresses, replica_set(*addresses) as (replicas, events):
        assert [await ask(replicas) for _ in range(4)] == [2.0] * 4
        assert refusing.calls >= 1
        assert events.count("retried", addresses[1]) >= 1


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidInput),
        (grpc.StatusCode.FAILED_PRECONDITION, WrongPart),
        (grpc.StatusCode.DEADLINE_EXCEEDED, DeadlineExceeded),
    ],
)
async def test_what_another_replica_would_refuse_too_is_not_repeated(
    code: grpc.StatusCode, error: type[Exception]
) -> None:
    one, other = Refusing(code), Refusing(code)
    async with served(one, other) as addresses, replica_set(*addresses) as (replicas, events):
        with pytest.raises(error):
            await ask(replicas)
        assert one.calls + other.calls == 1
        assert len(replicas.live) == 2
        assert events.count("retried") == 0


@pytest.mark.parametrize("make", [Corrupt, Garbling, partial(Refusing, grpc.StatusCode.INTERNAL)])
async def test_a_reply_that_cannot_be_right_goes_to_another_replica(make: Callable[[], Honest]) -> None:
    faulty, other = make(), Honest(2.0)
    async with served(faulty, other) as addresses, replica_set(*addresses) as (replicas, events):
        assert [await ask(replicas) for _ in range(4)] == [2.0] * 4
        assert faulty.calls >= 1
        assert events.count("retried", addresses[1]) >= 1


async def test_a_corrupt_reply_is_told_with_its_reason() -> None:
    async with served(Corrupt(), Honest(2.0)) as addresses, replica_set(*addresses) as (replicas, events):
        await ask(replicas)
        (event,) = [event for event in events.seen if event.what == "corrupt"]
        assert event.address == addresses[0]
        assert "not finite" in event.reason


async def test_corrupt_replies_of_everybody_are_no_answer() -> None:
    doubles = [Garbling(), Garbling()]
    async with served(*doubles) as addresses, replica_set(*addresses) as (replicas, _):
        with pytest.raises(CorruptReply, match="embedding gave a reply that cannot be right"):
            await ask(replicas)
        assert [double.calls for double in doubles] == [1, 1]
        assert replicas.live == []


async def test_what_is_not_finite_wherever_it_is_computed_is_nobodys_fault() -> None:
    doubles = [Corrupt(), Corrupt()]
    async with served(*doubles) as addresses, replica_set(*addresses) as (replicas, events):
        with pytest.raises(NotFinite, match="not finite"):
            await ask(replicas)
        assert [double.calls for double in doubles] == [1, 1]
        assert len(replicas.live) == 2
        assert events.count("corrupt") == 0


async def test_a_stranger_whose_description_is_garbage_gets_no_calls() -> None:
    garbling = Garbling(describes=False)
    async with served(garbling, Honest(2.0)) as addresses, replica_set(*addresses, live=1) as (replicas, events):
        await events.until(lambda: events.count("refused", addresses[0]) == 1)
        assert await ask(replicas) == 2.0
        assert garbling.calls == 0


@pytest.mark.parametrize(
    ("stranger", "reason"),
    [
        (Honest(kind="gating"), "it is a gating, not a embedding"),
        (Honest(kind=""), "it is a stranger"),
        (Honest(digest=bytes(32)), "it holds another embedding"),
        (Honest(digest=DIGEST[:-1]), "it holds another embedding"),
    ],
)
async def test_a_stranger_gets_no_calls(stranger: Honest, reason: str) -> None:
    async with served(stranger, Honest(2.0)) as addresses, replica_set(*addresses, live=1) as (replicas, events):
        await events.until(lambda: events.count("refused", addresses[0]) == 1)
        assert await asyncio.gather(*(ask(replicas) for _ in range(8))) == [2.0] * 8
        assert stranger.calls == 0
        assert replicas.replicas[0].state is State.REFUSED
        (refused,) = [event for event in events.seen if event.what == "refused"]
        assert reason in refused.reason


def test_parts_are_compared_by_name_and_digest() -> None:
    description = DescribeResponse(
        kind="expert", model_digest="m", parts=[Part(name="a", digest=b"1"), Part(name="b", digest=b"2")]
    )
    require_parts(description, "expert", "m", {"a": b"1"})
    require_parts(description, "expert", "m", {"a": b"1", "b": b"2"})
    for parts, reason in (({"c": b"1"}, "does not hold c"), ({"a": b"1", "b": b"1"}, "another b")):
        with pytest.raises(WrongPart, match=reason):
            require_parts(description, "expert", "m", parts)


async def test_nobody_left_is_said_at_once_and_by_name() -> None:
    async with served(Honest()) as addresses:
        pass
    async with replica_set(*addresses, "unix:/nowhere/at/all.sock", live=0) as (replicas, _):
        with within(0.5), pytest.raises(Unavailable, match="no replica of embedding answers") as caught:
            await ask(replicas)
        assert caught.value.stage == "embedding"
        port = addresses[0].rpartition(":")[2]
        for private in ("127.0.0.1", port, "nowhere", ".sock"):
            assert private not in str(caught.value)


async def test_a_replica_that_comes_back_is_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_FIRST_S", 0.01)
    monkeypatch.setattr(module, "RETRY_MOST_S", 0.05)
    address = f"unix:{tiny.scratch()}/replica.sock"
    async with AsyncExitStack() as life:
        await life.enter_async_context(Honest(1.0).served(address))
        async with replica_set(address) as (replicas, events):
            assert await ask(replicas) == 1.0
            await life.aclose()
            await events.until(lambda: events.count("lost") == 1)
            with pytest.raises(Unavailable):
                await ask(replicas)
            async with Honest(2.0).served(address):
                await events.until(lambda: events.count("live") == 2)
                assert await ask(replicas) == 2.0


async def test_a_replica_that_comes_back_as_another_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_FIRST_S", 0.01)
    monkeypatch.setattr(module, "RETRY_MOST_S", 0.05)
    address = f"unix:{tiny.scratch()}/replica.sock"
    async with AsyncExitStack() as life:
        await life.enter_async_context(Honest(1.0).served(address))
        async with replica_set(address) as (replicas, events):
            await life.aclose()
            await events.until(lambda: events.count("lost") == 1)
            changed = Honest(2.0, digest=bytes(32))
            async with changed.served(address):
                await events.until(lambda: events.count("refused") == 1)
                with pytest.raises(Unavailable):
                    await ask(replicas)
            assert changed.calls == 0


async def test_a_hanging_replica_costs_the_deadline_and_no_more() -> None:
    hanging = Hanging()
    async with served(hanging) as addresses, replica_set(*addresses) as (replicas, _):
        with within(0.8), pytest.raises(DeadlineExceeded):
            await ask(replicas, timeout_s=0.3)
        async with asyncio.timeout(WAIT_S):
            await hanging.cancelled.wait()
        assert replicas.replicas[0].calls_under_way == 0


async def test_a_deadline_that_has_passed_is_not_sent_on() -> None:
    honest = Honest()
    async with served(honest) as addresses, replica_set(*addresses) as (replicas, _):
        with pytest.raises(DeadlineExceeded):
            await ask(replicas, timeout_s=0.0)
        assert honest.calls == 0


async def test_a_call_that_is_cancelled_is_cancelled_at_the_replica() -> None:
    hanging = Hanging()
    async with served(hanging) as addresses, replica_set(*addresses) as (replicas, events):
        task = asyncio.create_task(ask(replicas))
        await hanging.arrived.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(WAIT_S):
            await hanging.cancelled.wait()
        assert replicas.replicas[0].calls_under_way == 0
        assert events.count("lost") == 0


async def test_nothing_is_left_behind() -> None:
    def following(tasks: set[asyncio.Task[Any]]) -> set[str]:
        return {repr(task) for task in tasks if "replica.py" in repr(task) and "expertmesh" in repr(task)}

    async with served(Honest(), Refusing()) as addresses:
        async with replica_set(*addresses, "unix:/nowhere/at/all.sock", live=2) as (replicas, _):
            await ask(replicas)
            assert following(asyncio.all_tasks()) != set()
        assert following(asyncio.all_tasks()) == set()


async def test_replicas_without_calls_under_way_take_turns() -> None:
    doubles = [Honest(1.0), Honest(2.0), Honest(3.0)]
    async with served(*doubles) as addresses, replica_set(*addresses) as (replicas, _):
        for _ in range(9):
            await ask(replicas)
    assert [double.calls for double in doubles] == [3, 3, 3]


async def test_a_replica_that_was_wrong_once_gets_no_calls_for_a_while() -> None:
    corrupt, honest = Corrupt(), Honest(2.0)
    async with served(corrupt, honest) as addresses, replica_set(*addresses) as (replicas, events):
        for _ in range(10):
            assert await ask(replicas) == 2.0
        assert corrupt.calls <= 1
        assert events.count("corrupt", addresses[0]) == corrupt.calls


async def test_a_process_of_another_model_behind_a_known_address_is_not_believed() -> None:
    changed, honest = Honest(1.0), Honest(2.0)
    async with served(changed, honest) as addresses, replica_set(*addresses) as (replicas, events):
        replicas.replicas[0].description.model_digest = "the model that was described"
        assert [await ask(replicas) for _ in range(4)] == [2.0] * 4
        assert "another model" in next(event.reason for event in events.seen if event.what == "corrupt")


def test_a_replica_started_with_another_manifest_is_refused() -> None:
    description = DescribeResponse(kind="expert", model_digest="m", parts=[Part(name="a", digest=b"1")])
    with pytest.raises(WrongPart, match="another manifest"):
        require_parts(description, "expert", "n", {"a": b"1"})


@pytest.mark.parametrize("code", [grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION])
async def test_within_the_mesh_a_refused_call_is_the_replicas_fault(code: grpc.StatusCode) -> None:
    refusing, honest = Refusing(code), Honest(2.0)
    async with served(refusing, honest) as addresses, replica_set(*addresses) as (replicas, events):
        replicas._failover.refusals_are_faults = True
        assert [await ask(replicas) for _ in range(4)] == [2.0] * 4
        assert events.count("corrupt", addresses[0]) == refusing.calls <= 1


async def test_a_replica_that_hangs_costs_one_attempt_and_not_the_callers_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertmesh.rpc.replicas.caller.ATTEMPT_TIMEOUT_S", 0.2)
    async with served(Hanging(), Honest(2.0)) as addresses, replica_set(*addresses) as (replicas, _):
        assert [await ask(replicas) for _ in range(3)] == [2.0] * 3


async def test_an_unforeseen_error_while_meeting_a_replica_does_not_end_the_meeting() -> None:
    surprises = iter([RuntimeError("surprise")])

    def admit(description: DescribeResponse) -> None:
        for surprise in surprises:
            raise surprise

    events = Events()
    async with served(Honest(2.0)) as addresses:
        replicas = ReplicaSet("embedding", addresses, open_channel, EmbeddingServiceStub, admit, events)
        async with replicas:
            await events.until(lambda: len(replicas.live) == 1)
