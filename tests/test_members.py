"""Replicas that join, drain and leave while calls are made."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from expertmesh.errors import Unavailable
from expertmesh.rpc.replicas import members as module
from expertmesh.rpc.replicas.replica import State
from expertmesh.rpc.settings import LINK_SUFFIX
from tests import tiny
from tests.doubles.embedder import WAIT_S, Embedder, ask, known

ADDRESSES = ("127.0.0.1:0", "unix")


def listen(kind: str) -> str:
    return f"unix:{tiny.scratch()}/e.sock" if kind == "unix" else kind


def following() -> int:
    """Tasks that follow a replica, or wait until it is gone."""
    return sum("Replica.follow" in repr(task) or "Members._let_go" in repr(task) for task in asyncio.all_tasks())


# Draining.


@pytest.mark.parametrize("address", ADDRESSES)
async def test_who_drains_gets_nothing_new_and_ends_what_is_under_way(address: str) -> None:
    old, new = Embedder(1.0), Embedder(2.0)
    old.go_on.clear()
    async with old.running(listen(address)), new.running(), known(old.address, new.address) as (replicas, events):
        under_way = [asyncio.create_task(ask(replicas)) for _ in range(2)]
        await old.arrived.wait()
        old.announce()
        await events.until(lambda: events.count("draining", old.address) == 1)
        assert [replica.address for replica in replicas.live] == [new.address]
        assert [await ask(replicas) for _ in range(6)] == [2.0] * 6
        old.go_on.set()
        assert sorted(await asyncio.gather(*under_way)) == [1.0, 2.0]
        assert old.calls == 1
        assert events.count("retried") == events.count("lost") == 0


@pytest.mark.parametrize("address", ADDRESSES)
async def test_the_only_one_still_serves_while_it_drains_until_it_refuses(address: str) -> None:
    only = Embedder(1.0)
    async with only.running(listen(address)), known(only.address) as (replicas, events):
        only.announce()
        await events.until(lambda: events.count("draining") == 1)
        assert [await ask(replicas) for _ in range(3)] == [1.0] * 3
        assert len(replicas.live) == 1
        only.link.drain()
        await events.until(lambda: events.count("lost") == 1)
        with pytest.raises(Unavailable):
            await ask(replicas)


async def test_one_that_drains_already_when_it_is_met_is_the_last_choice() -> None:
    old, new = Embedder(1.0), Embedder(2.0)
    async with old.running(), AsyncExitStack() as life:
        old.announce()
        async with known(old.address) as (replicas, events):
            assert replicas.replicas[0].state is State.DRAINING
            assert await ask(replicas) == 1.0
            await life.enter_async_context(new.running())
            replicas.set_addresses([old.address, new.address])
            await events.until(lambda: events.count("live", new.address) == 1)
            assert [await ask(replicas) for _ in range(4)] == [2.0] * 4
            await life.aclose()
            await events.until(lambda: events.count("lost", new.address) >= 1)
            assert await ask(replicas) == 1.0  # better than none


async def test_a_call_that_fails_elsewhere_is_repeated_where_it_drains() -> None:
    old, new = Embedder(1.0), Embedder(2.0)
    new.go_on.clear()
    async with old.running(), AsyncExitStack() as life:
        await life.enter_async_context(new.running())
        async with known(old.address, new.address) as (replicas, events):
            old.announce()
            await events.until(lambda: events.count("draining") == 1)
            call = asyncio.create_task(ask(replicas))
            await new.arrived.wait()
            await life.aclose()
            assert await call == 1.0


# Joining and leaving.


async def test_one_that_joins_is_met_before_it_gets_calls_and_a_stranger_gets_none() -> None:
    first, second, stranger = Embedder(1.0), Embedder(2.0), Embedder(3.0, digest=bytes(32))
    async with first.running(), second.running(), stranger.running(), known(first.address) as (replicas, events):
        replicas.set_addresses([first.address, second.address, stranger.address])
        assert await ask(replicas) == 1.0  # nobody else has been met yet
        await events.until(lambda: events.count("live", second.address) == 1)
        await events.until(lambda: events.count("refused", stranger.address) == 1)
        assert sorted([await ask(replicas) for _ in range(6)]) == [1.0] * 3 + [2.0] * 3
        assert stranger.calls == 0
        (refused,) = [event for event in events.seen if event.what == "refused"]
        assert "it holds another embedding" in refused.reason


async def test_one_that_leaves_ends_its_calls_and_is_gone_without_a_trace() -> None:
    stays, leaves = Embedder(1.0), Embedder(2.0)
    leaves.go_on.clear()
    async with stays.running(), leaves.running(), known(stays.address, leaves.address) as (replicas, events):
        under_way = [asyncio.create_task(ask(replicas)) for _ in range(2)]
        await leaves.arrived.wait()
        replicas.set_addresses([stays.address])
        assert [await ask(replicas) for _ in range(4)] == [1.0] * 4
        assert events.count("left") == 0
        leaves.go_on.set()
        assert sorted(await asyncio.gather(*under_way)) == [1.0, 2.0]
        await events.until(lambda: events.count("left", leaves.address) == 1)
        assert [replica.address for replica in replicas.replicas] == [stays.address]
        assert following() == 1
        async with asyncio.timeout(WAIT_S):
            while leaves.link._links:  # its end of the link is over as well
                await asyncio.sleep(0.01)
        assert leaves.calls == 1


async def test_one_that_leaves_and_does_not_end_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAVE_TIMEOUT_S", 0.2)
    stays, hangs = Embedder(1.0), Embedder(2.0)
    hangs.go_on.clear()
    async with stays.running(), hangs.running(), known(stays.address, hangs.address) as (replicas, events):
        calls = [asyncio.create_task(ask(replicas)) for _ in range(2)]
        await hangs.arrived.wait()
        replicas.set_addresses([stays.address])
        await events.until(lambda: events.count("left", hangs.address) == 1)
        assert await asyncio.gather(*calls) == [1.0, 1.0]  # the other one has been made again


async def test_the_last_one_stays_until_its_successor_is_there() -> None:
    old, new = Embedder(1.0), Embedder(2.0)
    path = f"unix:{tiny.scratch()}/new.sock"
    async with old.running(), known(old.address) as (replicas, events):
        replicas.set_addresses([path])
        assert [await ask(replicas) for _ in range(5)] == [1.0] * 5
        async with new.running(path):
            await events.until(lambda: events.count("left", old.address) == 1)
            assert [await ask(replicas) for _ in range(5)] == [2.0] * 5
            assert events.count("lost") == 0


async def test_an_address_that_comes_back_is_used_again_whether_it_was_gone_or_not() -> None:
    one, other = Embedder(1.0), Embedder(2.0)
    async with one.running(), other.running(), known(one.address, other.address) as (replicas, events):
        replicas.set_addresses([one.address])
        replicas.set_addresses([one.address, other.address])  # before it could go
        assert sorted([await ask(replicas) for _ in range(4)]) == [1.0, 1.0, 2.0, 2.0]
        replicas.set_addresses([one.address])
        await events.until(lambda: events.count("left", other.address) == 1)
        replicas.set_addresses([other.address, one.address])
        await events.until(lambda: len(replicas.live) == 2)
        assert sorted([await ask(replicas) for _ in range(4)]) == [1.0, 1.0, 2.0, 2.0]
    assert following() == 0


async def test_under_load_nothing_is_lost_while_replicas_come_and_go() -> None:
    doubles = [Embedder(float(number)) for number in range(4)]
    answers: list[float] = []
    failures: list[Any] = []
    async with AsyncExitStack() as life:
        for double in doubles:
            await life.enter_async_context(double.running())
        addresses = [double.address for double in doubles]
        async with known(addresses[0]) as (replicas, events):
            ended = asyncio.Event()

            async def load() -> None:
                while not ended.is_set():
                    try:
                        answers.append(await ask(replicas))
                    except Exception as error:
                        failures.append(error)

            callers = [asyncio.create_task(load()) for _ in range(4)]
            for count in (4, 1, 3, 1, 4, 1):
                chosen = addresses[:count] if count != 1 else [addresses[len(answers) % 4]]
                replicas.set_addresses(chosen)
                await events.until(lambda chosen=chosen: {one.address for one in replicas.replicas} == set(chosen))
                await events.until(lambda chosen=chosen: {one.address for one in replicas.live} == set(chosen))
                expected, before = {float(addresses.index(one)) for one in chosen}, len(answers)
                async with asyncio.timeout(30):
                    while not expected <= set(answers[before:]):
                        await asyncio.sleep(0.001)
            ended.set()
            await asyncio.gather(*callers)
    assert failures == []
    assert set(answers) == {0.0, 1.0, 2.0, 3.0}


async def test_a_link_that_cannot_be_opened_is_told_once() -> None:
    double = Embedder(1.0)
    path = f"unix:{tiny.scratch()}/e.sock"
    async with double.running(path):
        links = Path(path.removeprefix("unix:") + LINK_SUFFIX)
        links.rename(links.with_suffix(".away"))  # noqa: ASYNC240
        async with known(path, live=0) as (replicas, events):
            await events.until(lambda: events.count("refused") == 1)
            replica = replicas.replicas[0]
            for _ in range(3):  # it is tried again
                await replica._introduce()
            assert events.count("refused") == 1
            assert "offers links and takes none" in events.seen[0].reason
            links.with_suffix(".away").rename(links)
            await events.until(lambda: len(replicas.live) == 1)
