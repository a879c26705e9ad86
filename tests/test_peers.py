"""Replicas whose faults only a look at another one can tell, and what happens where there is no other."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from expertmesh.errors import MeshError
from expertmesh.rpc.replicas.replica import State
from tests.doubles.moody import Moody
from tests.replica_sets import ask, replica_set, served


async def test_one_that_was_seen_to_compute_other_bits_does_not_return_for_want_of_another() -> None:
    good, wrong = Moody(1.0), Moody(2.0)
    async with served(good, wrong) as (at_good, at_wrong), replica_set(at_good, at_wrong) as (replicas, events):
        one = next(replica for replica in replicas.replicas if replica.address == at_wrong)
        other = next(replica for replica in replicas.replicas if replica.address == at_good)
        one.refuse("caught")
        async with asyncio.timeout(30):
            while not any("not its peer's" in event.reason for event in events.seen):
                await ask(replicas)
                await asyncio.sleep(0.01)
            while one.state is not State.ON_PROBATION:
                await asyncio.sleep(0.01)
            good.code = grpc.StatusCode.UNAVAILABLE
            with pytest.raises(MeshError):
                await ask(replicas)
            good.code = None
            while other.state is not State.LIVE:
                await asyncio.sleep(0.01)
            assert {await ask(replicas) for _ in range(8)} == {1.0}


async def test_a_request_that_everybody_fails_ejects_nobody() -> None:
    both = Moody(1.0), Moody(1.0)
    async with served(*both) as addresses, replica_set(*addresses) as (replicas, events):
        for one in both:
            one.code = grpc.StatusCode.INTERNAL
        with pytest.raises(MeshError):
            await ask(replicas)
        for one in both:
            one.code = None
        assert await ask(replicas) == 1.0
        assert not [event for event in events.seen if event.what in ("ejected", "lost")]


async def test_one_that_is_busy_is_asked_last_for_a_moment() -> None:
    free, busy = Moody(1.0), Moody(1.0)
    async with served(free, busy) as addresses, replica_set(*addresses) as (replicas, events):
        busy.code = grpc.StatusCode.RESOURCE_EXHAUSTED
        for _ in range(100):
            assert await ask(replicas) == 1.0
        assert busy.calls < 30
        assert not [event for event in events.seen if event.what == "ejected"]
