from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import perf_counter

import pytest

from expertmesh.errors import InvalidInput
from expertmesh.serving.turns import SimulatedTime, Turns
from expertmesh.telemetry import metrics


def doubled(items: Sequence[int]) -> list[int]:
    return [2 * item for item in items]


async def test_work_runs_in_order_of_arrival() -> None:
    turns, done = Turns("turns-test"), []
    await asyncio.gather(*(turns.run(1, lambda number=number: done.append(number)) for number in range(20)))
    assert done == list(range(20))


async def test_what_waits_with_one_key_runs_together_and_everyone_gets_their_own() -> None:
    turns, runs = Turns("turns-test", most_rows=10), []

    def work(items: Sequence[int]) -> list[int]:
        runs.append(list(items))
        return doubled(items)

    keys = ["a", "b", "a", "a", "b"]
    calls = [turns.run_together(key, 4, number, work) for number, key in enumerate(keys)]
    assert await asyncio.gather(*calls) == [0, 2, 4, 6, 8]
    assert runs == [[0, 2], [1, 4], [3]]  # a third of a key would be more than 10 rows


async def test_what_came_alone_is_done_at_once() -> None:
    turns = Turns("turns-test")
    assert turns.run(1, lambda: "done", is_alone=True).result() == "done"
    together = turns.run_together("a", 1, 4, doubled, is_alone=True)
    assert together.done()
    assert await together == 8
    assert await turns.run(1, lambda: "and so on") == "and so on"


async def test_what_came_alone_waits_for_what_was_there_before() -> None:
    turns, seen = Turns("turns-test", SimulatedTime(0.01)), []
    first, second, third = (turns.run(1, lambda n=n: seen.append(n), is_alone=True) for n in range(3))
    assert seen == [0]  # the device is busy with it for some time
    assert not first.done()
    await second
    assert seen == [0, 1]
    await third
    assert seen == [0, 1, 2]


async def test_what_came_alone_and_failed_leaves_the_device_free() -> None:
    turns = Turns("turns-test")

    def fails() -> None:
        raise InvalidInput("bad")

    bad = turns.run(1, fails, is_alone=True)
    assert isinstance(bad.exception(), InvalidInput)
    assert turns.run(1, lambda: 3, is_alone=True).result() == 3


async def test_what_was_cancelled_is_not_computed() -> None:
    turns, seen = Turns("turns-test"), []
    first, second = (turns.run(1, lambda name=name: seen.append(name)) for name in ("first", "second"))
    second.cancel()
    await asyncio.gather(first, second, return_exceptions=True)
    assert await turns.run(1, lambda: "third") == "third"
    assert seen == ["first"]


async def test_an_error_reaches_its_caller_and_the_next_in_the_queue_is_served() -> None:
    turns = Turns("turns-test")

    def fails() -> None:
        raise InvalidInput("bad")

    bad, good = turns.run(1, fails), turns.run(1, lambda: 3)
    with pytest.raises(InvalidInput):
        await bad
    assert await good == 3


async def test_work_that_ends_oddly_fails_alone_and_the_queue_goes_on() -> None:
    turns = Turns("turns-test")

    def stops() -> None:
        raise StopIteration

    async with asyncio.timeout(5):
        odd = turns.run(1, stops)
        short = [turns.run_together("a", 1, item, lambda items: [0]) for item in range(2)]
        good = turns.run(1, lambda: 3)
        outcomes = await asyncio.gather(odd, *short, good, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [RuntimeError, ValueError, ValueError, int]


async def test_a_simulated_device_is_busy_with_one_piece_of_work_at_a_time() -> None:
    turns = Turns("turns-test", SimulatedTime(0.02, 0.01))
    started_s = perf_counter()
    await asyncio.gather(*(turns.run(2, lambda: None) for _ in range(3)))
    assert perf_counter() - started_s >= 3 * 0.04


def test_the_busy_share_is_that_of_the_last_ten_seconds() -> None:
    now_s = 100.0
    work = metrics.Work("turns-test-share", lambda: now_s)
    assert work.share() == 0
    work.done(5, 4.0)  # from 96 to 100
    assert work.share() == pytest.approx(0.4)
    now_s = 108.5
    work.done(5, 0.25)
    assert work.share() == pytest.approx(0.2)  # 98 to 108; the second that is not over does not count
    now_s = 109.0
    assert work.share() == pytest.approx(0.1 + 0.025)
    now_s = 150.0
    assert work.share() == 0
