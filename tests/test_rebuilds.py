"""What is computed anew: not too much at once, not what is too long, and nobody else waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import Unavailable
from expertmesh.serving.generation import Generation
from expertmesh.serving.rebuilds import BURST_S, MAX_LOSSES, RebuildLimits, Rebuilds
from expertmesh.serving.scheduler import StepLimits
from expertmesh.telemetry import metrics
from tests.doubles.keeper import Keeper, begun, drawn, followers, scheduling, wish


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def ended(generation: Generation) -> BaseException:
    with pytest.raises(Unavailable) as told:
        async with aclosing(generation.tokens()) as tokens, asyncio.timeout(5):
            await anext(tokens)
    return told.value


@settings(deadline=None)
@given(st.lists(st.integers(1, 300), max_size=30), st.integers(1, 200))
def test_no_more_rows_than_there_is_time_for_and_the_shortest_first(lengths: list[int], rows_per_s: int) -> None:
    async def rebuild() -> None:
        clock = Clock()
        rebuilds = Rebuilds(RebuildLimits(rows_per_s), lambda: None, clock)
        rebuilds.add([Generation(wish(length)) for length in lengths])
        given: list[int] = []
        while rebuilds:
            before = sum(given)
            taken = [len(one.ids) for one in rebuilds.due()]
            given += taken
            if taken:  # whatever is more than time has given is of the one that was taken last
                assert before + sum(taken[:-1]) < rows_per_s * (BURST_S + clock.now_s) + 1e-6
            clock.now_s += 0.1
            assert clock.now_s < 0.2 + sum(lengths) / rows_per_s  # and no fewer
        assert given == sorted(lengths)
        rebuilds.close()

    asyncio.run(rebuild())


async def test_without_a_limit_all_are_taken_at_once_and_who_left_is_forgotten() -> None:
    rebuilds = Rebuilds(RebuildLimits(0), lambda: None)
    some = [Generation(wish(length)) for length in (9000, 3, 70_000)]
    some[1].left = True
    rebuilds.add(some)
    assert rebuilds.due() == [some[0], some[2]]
    assert len(rebuilds) == 0


async def test_it_calls_when_more_may_be_taken() -> None:
    awake = asyncio.Event()
    rebuilds = Rebuilds(RebuildLimits(1000), awake.set)
    rebuilds.add([Generation(wish(length)) for length in (1010, 20, 1000)])
    assert [len(one.ids) for one in rebuilds.due()] == [20, 1000]
    async with asyncio.timeout(5):
        await awake.wait()
    assert [len(one.ids) for one in rebuilds.due()] == [1010]


async def test_what_is_too_long_or_was_lost_too_often_is_given_up() -> None:
    rebuilds = Rebuilds(RebuildLimits(most_tokens=100), lambda: None)
    fits, long, unlucky = Generation(wish(100)), Generation(wish(99), [1, 2]), Generation(wish(5))
    unlucky.losses = MAX_LOSSES + 1
    rebuilds.add([fits, long, unlucky])
    assert rebuilds.due() == [fits]
    assert "101 tokens" in str(await ended(long))
    assert "again and again" in str(await ended(unlucky))


def lost(rows_per_s: int, **more: Any) -> StepLimits:
    return StepLimits(rebuilds=RebuildLimits(rows_per_s, **more))


async def test_streams_that_run_and_new_ones_do_not_wait_for_those_that_are_computed_anew() -> None:
    dies, lives = Keeper(), Keeper()
    dies.pause()
    async with scheduling(dies, lives, limits=lost(10)) as scheduler:
        lives.is_live = False
        long = [asyncio.create_task(drawn(scheduler, wish(90 + number, 3))) for number in range(3)]
        await begun(dies)
        dies.is_live, lives.is_live = False, True
        dies.turns.release()
        async with asyncio.timeout(10):
            while not lives.opened:
                await asyncio.sleep(0)
        assert await drawn(scheduler, wish(7, 30)) == followers(wish(7, 30))
        assert await long[0] == followers(wish(90, 3))
        assert metrics.GENERATIONS.labels("rebuilding")._value.get() == 2  # for 8 s and more
        for task in long[1:]:
            task.cancel()
        await asyncio.gather(*long, return_exceptions=True)
    assert lives.cached == {}


async def test_a_home_that_is_lost_while_some_wait_to_be_computed_anew_ends_them() -> None:
    home = Keeper()
    home.pause()
    async with scheduling(home, limits=lost(1)) as scheduler:
        tasks = [asyncio.create_task(drawn(scheduler, wish(number))) for number in (5, 6)]
        await begun(home)
        home.is_live = False
        home.turns.release()
        for task in tasks:
            with pytest.raises(Unavailable, match="no home is live"):
                await task


async def test_what_was_known_elsewhere_is_gone_on_with() -> None:
    home = Keeper()
    asked = wish(40, 9)
    known = followers(asked)[:4]
    rows = metrics.REBUILT_ROWS._value.get()

    async def resumed(scheduler: Any, known: Sequence[int]) -> list[int]:
        async with aclosing(scheduler.generate(asked, known)) as tokens:
            return [token.drawn.id async for token in tokens]

    async with scheduling(home, limits=lost(0, most_tokens=44)) as scheduler:
        assert await resumed(scheduler, known) == followers(asked)[4:]
        assert metrics.REBUILT_ROWS._value.get() == rows + 44
        with pytest.raises(Unavailable, match="45 tokens"):
            await resumed(scheduler, followers(asked)[:5])
    assert home.cached == {}
