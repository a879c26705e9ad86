from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from time import monotonic
from typing import Any

import pytest

from expertmesh import wire
from expertmesh.errors import DeadlineExceeded, Unavailable
from expertmesh.rpc.alarms import Alarms
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.replicas import hedging
from expertmesh.rpc.replicas.hedging import Hedging, Race, size_of
from expertmesh.rpc.replicas.latency import LEAST, Latency, Times
from expertmesh.rpc.replicas.replica_set import ReplicaSet
from expertmesh.telemetry import metrics
from expertmesh.v1.embedding_pb2 import EmbedRequest
from expertmesh.v1.expert_pb2 import ApplyRequest
from expertmesh.v1.gating_pb2 import GateRequest, Place
from tests import tiny
from tests.doubles.moody import Moody
from tests.replica_sets import WAIT_S, ask, read_number, replica_set, served


class Runner:
    """A call that ends when it is told to."""

    def __init__(self) -> None:
        self.outcome: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.begun = asyncio.Event()
        self.cancelled = False

    async def run(self) -> str:
        self.begun.set()
        try:
            return await self.outcome
        except asyncio.CancelledError:
            self.cancelled = True
            raise


class Track:
    """A race of two calls, the second of which begins at once if it is wanted."""

    def __init__(self, waits: list[float] | None = None) -> None:
        self.first, self.second = Runner(), Runner()
        self._waits = waits or []
        self.race: Race[str] = Race(Alarms(), monotonic(), self._begin)

    def _begin(self) -> Coroutine[Any, Any, str] | float:
        return monotonic() + self._waits.pop() if self._waits else self.second.run()

    async def start(self) -> asyncio.Task[str]:
        task = asyncio.create_task(self.race.run(self.first.run()))
        async with asyncio.timeout(WAIT_S):
            await self.second.begun.wait()
        return task


async def test_alarms_ring_in_time_and_once_unless_they_are_withdrawn() -> None:
    alarms, rung = Alarms(), asyncio.Queue[tuple[int, float]]()
    started_s = monotonic()
    rings = [lambda number=number: rung.put_nowait((number, monotonic())) for number in range(4)]
    for number, delay_s in enumerate((0.2, 0.05, 0.1, 0.0)):
        alarms.set(rings[number], started_s + delay_s)
    alarms.withdraw(rings[2])
    async with asyncio.timeout(WAIT_S):
        told = [await rung.get() for _ in range(3)]
    assert [number for number, _ in told] == [3, 1, 0]
    assert all(at_s - started_s >= delay_s for (_, at_s), delay_s in zip(told, (0.0, 0.05, 0.2), strict=True))
    alarms.set(rings[0], monotonic())
    alarms.close()
    await asyncio.sleep(0.01)
    assert rung.empty()


async def test_the_second_answers_in_place_of_the_first() -> None:
    track = Track()
    task = await track.start()
    track.second.outcome.set_result("second")
    assert await task == "second"
    assert track.race.second_won
    assert track.first.cancelled
    assert task.cancelling() == 0


async def test_the_first_may_still_answer() -> None:
    track = Track(waits=[0.001, 0.001])
    task = await track.start()
    track.first.outcome.set_result("first")
    assert await task == "first"
    await asyncio.sleep(0)
    assert track.second.cancelled
    assert not track.race.second_won


async def test_both_at_once_are_one_answer() -> None:
    track = Track()
    task = await track.start()
    track.second.outcome.set_result("second")
    track.first.outcome.set_result("first")
    assert await task in ("first", "second")
    assert task.cancelling() == 0


async def test_a_second_that_fails_leaves_the_first_alone() -> None:
    track = Track()
    task = await track.start()
    track.second.outcome.set_exception(Unavailable("gone", "embedding"))
    await asyncio.sleep(0.01)
    track.first.outcome.set_result("first")
    assert await task == "first"


async def test_a_first_that_fails_waits_for_the_second() -> None:
    track = Track()
    task = await track.start()
    track.first.outcome.set_exception(Unavailable("gone", "embedding"))
    await asyncio.sleep(0.01)
    assert not task.done()
    track.second.outcome.set_result("second")
    assert await task == "second"


async def test_if_both_fail_the_call_fails() -> None:
    track = Track()
    task = await track.start()
    track.first.outcome.set_exception(Unavailable("gone", "embedding"))
    track.second.outcome.set_exception(Unavailable("gone too", "embedding"))
    with pytest.raises(Unavailable, match="gone too"):
        await task


async def test_a_deadline_is_over_for_both() -> None:
    track = Track()
    task = await track.start()
    track.first.outcome.set_exception(DeadlineExceeded("over"))
    with pytest.raises(DeadlineExceeded):
        await task
    await asyncio.sleep(0)
    assert track.second.cancelled


@pytest.mark.parametrize("first_failed", [False, True])
async def test_whoever_leaves_ends_both(first_failed: bool) -> None:
    track = Track()
    task = await track.start()
    if first_failed:
        track.first.outcome.set_exception(Unavailable("gone", "embedding"))
        await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.sleep(0)
    assert track.first.cancelled is not first_failed
    assert track.second.cancelled


async def test_whoever_leaves_when_the_second_answers_is_let_go() -> None:
    track = Track()
    task = await track.start()
    track.second.outcome.set_result("second")
    while not track.race.second_won:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_pure_calls_have_a_size_and_others_none() -> None:
    rows = wire.encode(tiny.random_rows(5))
    assert size_of("Apply", ApplyRequest(rows=rows)) == 5
    assert size_of("Gate", GateRequest(rows=rows)) == 5
    assert size_of("Gate", GateRequest(rows=rows, places=[Place(sequence=b"s")])) is None
    assert size_of("Open", None) is None


def test_nothing_is_told_of_too_few_calls() -> None:
    times = Times()
    for _ in range(LEAST - 1):
        times.add(0.1)
    assert Hedging().delay_s(times) == float("inf")
    times.add(0.1)
    assert Hedging().delay_s(times) == pytest.approx(0.1)


def test_the_p95_is_of_what_was_seen_lately() -> None:
    times = Times()
    for number in range(1000):
        times.add(5.0 if number < 500 else (number % 64) / 64)
    assert 0.9 <= times.p95_s <= 0.99
    assert 0.4 <= times.median_s <= 0.6


def test_sizes_have_times_of_their_own() -> None:
    latency = Latency()
    assert latency.of("Apply", 1) is not latency.of("Apply", 256)
    assert latency.of("Apply", 1) is not latency.of("Share", 1)
    assert latency.of("Apply", 200) is latency.of("Apply", 255)


def test_what_is_late_by_nature_leaves_tokens_for_what_hangs() -> None:
    hedging_, times = Hedging(), Times()
    for _ in range(LEAST):
        times.add(0.1)
    for _ in range(320):
        hedging_.earn()
    taken = 0
    while hedging_.allows(0.1, times) is True:
        taken += 1
    assert taken == pytest.approx(hedging.MOST / 2, abs=1)
    assert hedging_.allows(0.1, times) == pytest.approx(0.2)
    assert hedging_.allows(0.31, times) is True


def calls_of(why: str) -> float:
    return metrics.REGISTRY.get_sample_value("expertmesh_calls_total", {"service": "embedding", "why": why}) or 0.0


async def practised(replicas: ReplicaSet, calls: int = 80) -> None:
    """Enough calls that the p95 is known and there are tokens."""
    for _ in range(calls):
        await ask(replicas)


async def test_a_replica_that_hangs_is_masked_by_another() -> None:
    hanging, other = Moody(1.0), Moody(2.0)
    async with served(hanging, other) as addresses, replica_set(*addresses) as (replicas, events):
        await practised(replicas)
        hanging.hangs, asked, hedged = True, hanging.calls, calls_of("hedge")
        answers = [await ask(replicas) for _ in range(4)]
        assert set(answers) == {2.0}
        assert hanging.calls > asked
        assert calls_of("hedge") - hedged == hanging.calls - asked
        async with asyncio.timeout(WAIT_S):
            while hanging.cancelled < hanging.calls - asked:
                await asyncio.sleep(0.01)
        assert [replica.calls_under_way for replica in replicas.replicas] == [0, 0]
        assert events.count("lost") == 0


async def test_hedges_are_at_most_a_twentieth_of_the_calls() -> None:
    doubles = [Moody(1.0), Moody(1.0)]
    async with served(*doubles) as addresses, replica_set(*addresses) as (replicas, _):
        first, hedged = calls_of("first"), calls_of("hedge")
        await practised(replicas)
        for double in doubles:
            double.delay_s = 0.15  # all of them late
        for _ in range(10):
            await asyncio.gather(*(ask(replicas) for _ in range(16)))
        first, hedged = calls_of("first") - first, calls_of("hedge") - hedged
        assert first == 240
        assert 1 <= hedged <= 0.05 * first + 1
        assert sum(double.calls + double.cancelled for double in doubles) <= first + hedged


async def test_a_call_to_one_replica_is_not_given_to_another() -> None:
    slow, other = Moody(1.0), Moody(2.0)
    async with served(slow, other) as addresses, replica_set(*addresses) as (replicas, _):
        await practised(replicas)
        slow.delay_s, others = 0.3, other.calls
        request = EmbedRequest(ids=tiny.wire_ids(0))
        for _ in range(3):
            given = await replicas.call("Embed", request, Deadline.after(WAIT_S), read_number, at=replicas.replicas[0])
            assert given == 1.0
        assert other.calls == others
        assert len(replicas.live) == 2  # slow as it is: what it keeps would be lost
