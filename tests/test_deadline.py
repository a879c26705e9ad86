from __future__ import annotations

import math
from typing import Any

import grpc.aio
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.errors import DeadlineExceeded
from expertmesh.rpc import deadline as module
from expertmesh.rpc.deadline import HOP_MARGIN_S, MAX_TIMEOUT_S, Deadline
from expertmesh.v1.embedding_pb2 import EmbedRequest, EmbedResponse
from expertmesh.v1.embedding_pb2_grpc import (
    EmbeddingServiceServicer,
    EmbeddingServiceStub,
    add_EmbeddingServiceServicer_to_server,
)
from tests import tiny


class Clock:
    """Stands for the module `time`."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def test_what_is_left_shrinks(clock: Clock) -> None:
    deadline = Deadline.after(2.0)
    assert deadline.remaining_s() == 2.0
    clock.now_s += 1.5
    assert deadline.remaining_s() == 0.5
    assert deadline.next_hop_s() == pytest.approx(0.5 - HOP_MARGIN_S)


@pytest.mark.parametrize("passed_s", [2.0, 2.5, 1e9])
def test_nothing_is_left_of_a_deadline_that_has_passed(clock: Clock, passed_s: float) -> None:
    deadline = Deadline.after(2.0)
    clock.now_s += passed_s
    with pytest.raises(DeadlineExceeded):
        deadline.remaining_s()
    with pytest.raises(DeadlineExceeded):
        deadline.next_hop_s()


def test_what_is_too_little_for_a_hop_is_not_handed_on(clock: Clock) -> None:
    deadline = Deadline.after(2.0)
    clock.now_s += 2.0 - HOP_MARGIN_S / 2
    assert deadline.remaining_s() > 0
    with pytest.raises(DeadlineExceeded):
        deadline.next_hop_s()


@pytest.mark.parametrize("timeout_s", [1e12, math.inf])
def test_a_timeout_is_bounded(clock: Clock, timeout_s: float) -> None:
    assert Deadline.after(timeout_s).remaining_s() == MAX_TIMEOUT_S


@pytest.mark.parametrize("timeout_s", [0.0, -1.0, -math.inf])
def test_no_time_is_no_time(clock: Clock, timeout_s: float) -> None:
    with pytest.raises(DeadlineExceeded):
        Deadline.after(timeout_s).remaining_s()


@given(st.floats(0, 1e6), st.floats(0, 1e6))
def test_deadlines_are_ordered_by_time(one: float, other: float) -> None:
    assert (Deadline(one) < Deadline(other)) == (one < other)
    assert max(Deadline(one), Deadline(other)) == Deadline(max(one, other))


class Noting(EmbeddingServiceServicer):
    def __init__(self) -> None:
        self.left_s: list[float] = []

    async def Embed(self, request: Any, context: Any) -> EmbedResponse:
        self.left_s.append(Deadline.of_call(context, default_s=7.0).remaining_s())
        return EmbedResponse()


async def test_a_calls_deadline_is_the_callers_or_the_default() -> None:
    noting = Noting()
    async with (
        tiny.served((add_EmbeddingServiceServicer_to_server, noting)) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        embed = EmbeddingServiceStub(channel).Embed
        for timeout_s in (20.0, None, 1e6):
            await embed(EmbedRequest(), timeout=timeout_s)
    given, default, huge = noting.left_s
    assert 18 < given <= 20.1  # gRPC rounds a timeout up on the wire: here to 100 ms, from 100 s on to whole seconds
    assert 6 < default <= 7
    assert huge <= MAX_TIMEOUT_S
