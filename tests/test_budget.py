from __future__ import annotations

import asyncio
from collections import Counter

import grpc
import pytest

from expertmesh.errors import CorruptReply, MeshError, NotFinite, Overloaded, Unavailable
from expertmesh.rpc.replicas.budget import Budget
from tests.doubles.corrupt import Corrupt
from tests.doubles.honest import Honest
from tests.doubles.refusing import Refusing
from tests.replica_sets import ask, replica_set, served

CALLS = 300
MOST_CALLS = 1.2  # in all, of what there would be without faults


def test_a_budget_gives_what_it_holds_and_then_what_calls_earn() -> None:
    budget = Budget(0.25, 3, 3)
    assert [budget.take() for _ in range(4)] == [True, True, True, False]
    for _ in range(3):
        budget.earn()
    assert not budget.take()
    budget.earn()
    assert budget.take()
    assert not budget.take()


def test_a_budget_does_not_grow_without_bound() -> None:
    budget = Budget(0.5, 2, 0)
    for _ in range(100):
        budget.earn()
    assert budget.is_half_full
    assert sum(budget.take() for _ in range(100)) == 2


def overloaded() -> Honest:
    return Refusing(grpc.StatusCode.RESOURCE_EXHAUSTED)


@pytest.mark.parametrize("make", [Corrupt, Refusing, overloaded])
async def test_where_every_replica_is_bad_there_is_no_storm(make: type[Honest]) -> None:
    doubles = [make(), make(), make()]
    failures: Counter[type[MeshError]] = Counter()
    async with served(*doubles) as addresses, replica_set(*addresses) as (replicas, _):
        for _ in range(CALLS):
            with pytest.raises((Unavailable, CorruptReply, Overloaded)) as caught:
                await ask(replicas)
            failures[caught.type] += 1
    assert len(doubles) <= sum(double.calls for double in doubles) <= MOST_CALLS * CALLS
    if make is Corrupt:  # two opinions are what it takes to say that nobody is at fault
        assert failures.keys() == {NotFinite, Unavailable}


async def test_a_busy_replica_is_not_at_fault_and_another_answers() -> None:
    busy, other = overloaded(), Honest(2.0)
    async with served(busy, other) as addresses, replica_set(*addresses) as (replicas, events):
        replicas._failover.refusals_are_faults = True
        assert [await ask(replicas) for _ in range(8)] == [2.0] * 8
        assert busy.calls >= 1  # and then others are asked first for a moment
        assert len(replicas.live) == 2
        assert {event.what for event in events.seen} == {"live", "retried"}


async def test_without_tokens_a_failure_is_told_at_once() -> None:
    refusing, other = Refusing(), Honest(2.0)
    async with served(refusing, other) as addresses, replica_set(*addresses) as (replicas, _):
        while replicas._failover.retries.take():
            pass
        told = await asyncio.gather(*(ask(replicas) for _ in range(2)), return_exceptions=True)
    (failure,) = [one for one in told if one != 2.0]
    assert isinstance(failure, Unavailable)
    assert failure.stage == "embedding"
    assert "had to be repeated" in str(failure)
    assert refusing.calls == 1
