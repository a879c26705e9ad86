from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from expertmesh.errors import NotFinite, Unavailable
from expertmesh.rpc.link.reply import Reply
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas import ejection
from expertmesh.rpc.replicas.ejection import FAILURES_IN_ROW, FORGIVEN_S, LATE_IN_ROW, PAUSE_MOST_S, Record, Why
from expertmesh.rpc.replicas.latency import Times
from expertmesh.rpc.replicas.probation import Probation, Witness
from expertmesh.rpc.replicas.replica import State
from expertmesh.rpc.replicas.replica_set import ReplicaSet
from expertmesh.rpc.replicas.sent import Sent
from expertmesh.telemetry import metrics
from expertmesh.v1.inference_pb2 import Classification, ClassifyResponse
from tests.doubles.moody import Moody
from tests.replica_sets import WAIT_S, ask, replica_set, served

NAN = float("nan")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses that a test can wait for."""
    monkeypatch.setattr(ejection, "PAUSE_FIRST_S", 0.05)
    monkeypatch.setattr(ejection, "PAUSE_MOST_S", 0.1)


def test_pauses_double_up_to_a_bound_and_are_forgiven() -> None:
    clock = Clock()
    record = Record(clock)
    pauses_s = []
    for _ in range(5):
        pauses_s.append(record.leave(Why.WRONG))
        clock.now_s += 5
    assert pauses_s == [1, 2, 4, 4, 4]
    assert max(pauses_s) == PAUSE_MOST_S
    clock.now_s += FORGIVEN_S
    assert record.leave(Why.WRONG) == 1
    assert record.pause_s == 1
    clock.now_s += 1.5
    assert record.pause_s == -0.5


def test_failures_in_a_row_are_a_habit_and_single_ones_are_not() -> None:
    record = Record()
    for _ in range(FAILURES_IN_ROW - 1):
        record.failed()
    assert record.is_failing([Record()]) == ""
    record.failed()
    assert "in a row" in record.is_failing([Record()])
    record.leave(Why.FAILING)
    assert record.is_failing([Record()]) == ""


def fail_now_and_then(record: Record, good: int) -> None:
    for number in range(200):
        record.answered()
        if not number % good:
            record.failed()


def test_a_share_of_failures_counts_beside_that_of_peers() -> None:
    record, peer, honest = Record(), Record(), Record()
    fail_now_and_then(record, 2)
    fail_now_and_then(peer, 2)
    assert "of its calls failed" in record.is_failing([honest])
    assert record.is_failing([peer]) == ""
    assert record.is_failing([]) == ""
    seldom = Record()
    fail_now_and_then(seldom, 20)
    assert seldom.is_failing([honest]) == ""


def test_slow_is_what_is_much_slower_than_its_peers_for_a_while() -> None:
    record, peer = Record(), Record()
    record.answered(5.0, 0.1)
    assert record.is_slow([peer]) == ""
    for _ in range(40):
        record.answered(5.0, 0.1)
        peer.answered(0.1, 0.1)
    assert "times as slow" in record.is_slow([peer])
    assert record.is_slow([]) == ""
    for _ in range(40):
        peer.answered(5.0, 0.1)
    assert record.is_slow([peer]) == ""


def test_one_that_others_answer_for_again_and_again_is_slow() -> None:
    record = Record()
    for _ in range(LATE_IN_ROW - 1):
        record.late(0.1, 0.1)
    record.answered(0.1, 0.1)
    record.late(0.1, 0.1)
    assert record.is_slow([Record()]) == ""
    for _ in range(LATE_IN_ROW - 1):
        record.late(0.1, 0.1)
    assert "in its place" in record.is_slow([Record()])


async def until(holds: Callable[[], bool], replicas: ReplicaSet) -> set[float]:
    """Makes calls until something holds; gives what was answered."""
    answers = set()
    async with asyncio.timeout(WAIT_S):
        while not holds():
            answers.add(await ask(replicas))
            await asyncio.sleep(0.005)
    return answers


def ejections(address: str, why: str) -> float:
    labels = {"service": "embedding", "address": address, "why": why}
    return metrics.REGISTRY.get_sample_value("expertmesh_ejections_total", labels) or 0.0


@pytest.mark.usefixtures("short")
async def test_a_replica_that_was_wrong_is_named_and_returns_when_it_is_mended() -> None:
    wrong, other = Moody(NAN), Moody(2.0)
    async with served(wrong, other) as addresses, replica_set(*addresses) as (replicas, events):
        assert await until(lambda: events.count("ejected", addresses[0]) > 0, replicas) <= {2.0}
        assert ejections(addresses[0], "wrong") >= 1
        (event,) = [event for event in events.seen if event.what == "ejected"]
        assert "not finite" in event.reason
        wrong.number = 2.0
        assert await until(lambda: events.count("returned", addresses[0]) == 1, replicas) == {2.0}
        assert len(replicas.live) == 2
        asked = wrong.calls
        assert [await ask(replicas) for _ in range(4)] == [2.0] * 4
        assert wrong.calls > asked


@pytest.mark.usefixtures("short")
async def test_a_replica_whose_weights_are_changed_does_not_return() -> None:
    changed, other = Moody(NAN), Moody(2.0)
    async with served(changed, other) as addresses, replica_set(*addresses) as (replicas, events):
        await until(lambda: events.count("ejected", addresses[0]) > 0, replicas)
        changed.number = 3.0  # finite, well shaped, of the right digest, and not what the weights give
        assert await until(lambda: events.count("ejected", addresses[0]) > 3, replicas) <= {2.0}
        assert "not its peer's" in [event.reason for event in events.seen if event.what == "ejected"][-1]
        assert events.count("returned") == 0
        changed.number = 2.0
        assert await until(lambda: events.count("returned") == 1, replicas) == {2.0}


@pytest.mark.usefixtures("short")
async def test_the_only_replica_is_tried_again_after_its_pause() -> None:
    lone = Moody(2.0)
    async with served(lone) as addresses, replica_set(*addresses) as (replicas, events):
        replicas.replicas[0].refuse("its reply cannot be right")
        assert replicas.replicas[0].state is State.EJECTED
        with pytest.raises(Unavailable, match="1 ejected"):
            await ask(replicas)
        await events.until(lambda: events.count("returned") == 1)
        assert await ask(replicas) == 2.0


@pytest.mark.usefixtures("short")
async def test_one_on_probation_is_taken_back_when_nobody_else_is_left() -> None:
    mended, other = Moody(NAN), Moody(2.0)
    async with served(mended, other) as addresses, replica_set(*addresses) as (replicas, events):
        await until(lambda: events.count("ejected", addresses[0]) > 0, replicas)
        mended.number = 2.0
        async with asyncio.timeout(WAIT_S):
            while replicas.replicas[0].state is not State.ON_PROBATION:
                await asyncio.sleep(0.01)
        replicas.replicas[1].lose("for a test")
        assert replicas.live == [replicas.replicas[0]]
        assert await ask(replicas) == 2.0


async def test_a_replica_that_fails_again_and_again_is_left_for_longer() -> None:
    failing, other = Moody(1.0), Moody(2.0)
    failing.code = grpc.StatusCode.UNAVAILABLE
    async with served(failing, other) as addresses, replica_set(*addresses) as (replicas, events):
        assert await until(lambda: events.count("ejected", addresses[0]) > 0, replicas) == {2.0}
        assert events.count("lost", addresses[0]) == FAILURES_IN_ROW - 1
        assert ejections(addresses[0], "failing") >= 1


@pytest.mark.usefixtures("short")
async def test_a_slow_replica_is_ejected_and_returns_when_it_is_fast() -> None:
    slow, other = Moody(2.0), Moody(2.0)
    async with served(slow, other) as addresses, replica_set(*addresses) as (replicas, events):
        for _ in range(60):
            await ask(replicas)
        slow.delay_s = 0.15
        await until(lambda: events.count("ejected", addresses[0]) > 0, replicas)
        assert ejections(addresses[0], "slow") >= 1
        slow.delay_s = 0.0
        await until(lambda: events.count("returned", addresses[0]) > 0, replicas)
        assert events.count("ejected", addresses[1]) == 0


async def test_the_last_replica_is_not_left_for_being_slow() -> None:
    slow, other = Moody(1.0), Moody(2.0)
    async with served(slow, other) as addresses, replica_set(*addresses) as (replicas, events):
        for _ in range(60):
            await ask(replicas)
        replicas.replicas[1].eject(Why.WRONG, "for a test")
        slow.delay_s = 0.1
        assert [await ask(replicas) for _ in range(8)] == [1.0] * 8
        assert events.count("ejected", addresses[0]) == 0


async def test_what_is_not_finite_anywhere_ejects_nobody() -> None:
    doubles = [Moody(NAN), Moody(NAN)]
    async with served(*doubles) as addresses, replica_set(*addresses) as (replicas, events):
        for _ in range(3):
            with pytest.raises(NotFinite):
                await ask(replicas)
        assert events.count("ejected") == 0


class Answering:
    """In place of a full model: it answers with what it is given, and remembers what was made of that."""

    def __init__(self, reply: ClassifyResponse) -> None:
        self.address, self.state, self.record = "somewhere", State.ON_PROBATION, Record()
        self._reply = reply
        self.verdicts: list[str] = []

    def send(self, method: str, request: Any, timeout_s: float, patience_s: float) -> Sent:
        sent = Sent(Reply(), Origin("", "cpu"), timeout_s, patience_s)
        sent.reply.settle(self._reply)
        return sent

    def read(self, sent: Sent, read: Any) -> Any:
        return read(sent.reply.message, sent.origin)

    def acquit(self, reason: str) -> None:
        self.verdicts.append("acquitted")

    def refuse(self, reason: str) -> None:
        self.verdicts.append("refused")


def classified(logit: float, **more: Any) -> ClassifyResponse:
    return ClassifyResponse(results=[Classification(logits=[logit], route=more.pop("route", 0))], **more)


@pytest.mark.parametrize(
    ("logit", "profile", "verdict"), [(1, "cpu", "acquitted"), (2, "cpu", "refused"), (2, "cuda", "acquitted")]
)
async def test_numbers_are_compared_where_profiles_are_the_same(logit: float, profile: str, verdict: str) -> None:
    witness = Witness(lambda reply, origin: reply)
    witness(classified(1, request_id="a", route=1), Origin("", profile))
    full_model = Answering(classified(logit, request_id="b"))
    probation = Probation("full_model")
    probation.begin(full_model, "Classify", None, witness, Times())
    async with asyncio.timeout(WAIT_S):
        while not full_model.verdicts:
            await asyncio.sleep(0)
    assert full_model.verdicts == [verdict]
