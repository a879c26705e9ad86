from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import DeadlineExceeded, InvalidInput, MeshError, Overloaded, Unavailable
from expertmesh.rpc.deadline import Deadline
from expertmesh.serving.batcher import TURN, Batcher, Limits
from expertmesh.serving.overlap import MOST_LEVEL

WAIT_S = 10.0


def soon() -> Deadline:
    return Deadline.after(WAIT_S)


class Passes:
    """Answers work by its square, once `go_on` is set; takes down what every pass was given."""

    def __init__(self, open_: bool = True) -> None:
        self.given: list[list[int]] = []
        self.deadlines: list[Deadline] = []
        self.started = asyncio.Event()
        self.cancelled = 0
        self.most_at_once = 0
        self._at_once = 0
        self.go_on = asyncio.Event()
        if open_:
            self.go_on.set()

    async def __call__(self, work: list[int], deadline: Deadline) -> Sequence[int | MeshError]:
        self.given.append(work)
        self.deadlines.append(deadline)
        self.started.set()
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self._at_once -= 1
        return [InvalidInput(f"{item} is below zero") if item < 0 else item * item for item in work]


async def settle() -> None:
    """Lets every task run until it waits for something."""
    for _ in range(20):
        await asyncio.sleep(0)


async def one_then(
    batcher: Batcher[int, int], works: Sequence[list[int]], deadlines: Sequence[Deadline] = ()
) -> list[asyncio.Task[list[int]]]:
    """Calls of which the first is in a pass of its own before the others come."""
    tasks = []
    for number, work in enumerate(works):
        tasks.append(asyncio.create_task(batcher.submit(work, deadlines[number] if deadlines else soon())))
        if number == 0:
            await settle()
    await settle()
    return tasks


async def test_answers_are_in_the_order_of_the_texts() -> None:
    batcher: Batcher[int, int] = Batcher(Passes(), Limits(pass_texts=3, passes=2))
    assert await batcher.submit(list(range(10)), soon()) == [item * item for item in range(10)]


async def test_calls_that_wait_share_a_pass() -> None:
    passes = Passes(open_=False)
    batcher: Batcher[int, int] = Batcher(passes, Limits(passes=1))
    tasks = await one_then(batcher, [[number] for number in range(9)])
    assert passes.given == [[0]]
    passes.go_on.set()
    assert await asyncio.gather(*tasks) == [[number * number] for number in range(9)]
    assert passes.given == [[0], list(range(1, 9))]


async def test_calls_that_arrive_at_the_same_time_share_a_pass() -> None:
    passes = Passes()
    batcher: Batcher[int, int] = Batcher(passes, Limits(passes=2))
    await asyncio.gather(*(batcher.submit([number], soon()) for number in range(8)))
    assert passes.given == [[0, 1, 2, 3], [4, 5, 6, 7]]  # and leave some for the other one


async def test_a_pass_starts_at_once_when_there_is_room() -> None:
    passes = Passes(open_=False)
    batcher: Batcher[int, int] = Batcher(passes, Limits(passes=2))
    tasks = await one_then(batcher, [[0], [1]])
    tasks += [asyncio.create_task(batcher.submit([2], soon()))]
    await settle()
    assert passes.given == [[0], [1]]
    passes.go_on.set()
    await asyncio.gather(*tasks)
    assert passes.most_at_once == 2


async def test_a_small_call_does_not_wait_for_a_large_one() -> None:
    passes = Passes()
    batcher: Batcher[int, int] = Batcher(passes, Limits(pass_texts=2 * TURN, passes=1))
    large = asyncio.create_task(batcher.submit([1] * (50 * TURN), soon()))
    await passes.started.wait()
    small = asyncio.create_task(batcher.submit([7], soon()))
    assert await small == [49]
    assert not large.done()
    assert next(index for index, work in enumerate(passes.given) if 7 in work) <= 2
    assert await large == [1] * (50 * TURN)


async def test_calls_take_turns_within_a_pass() -> None:
    passes = Passes(open_=False)
    batcher: Batcher[int, int] = Batcher(passes, Limits(pass_texts=3 * TURN, passes=1))
    tasks = await one_then(batcher, [[0], [1] * (3 * TURN), [2] * (3 * TURN)])
    passes.go_on.set()
    await asyncio.gather(*tasks)
    assert passes.given[1] == [1] * TURN + [2] * TURN + [1] * TURN


async def test_the_oldest_call_gets_on_however_many_come() -> None:
    passes = Passes()
    batcher: Batcher[int, int] = Batcher(passes, Limits(pass_texts=2 * TURN, passes=1))
    old = asyncio.create_task(batcher.submit([1] * (8 * TURN), soon()))
    others = []
    while not old.done():
        others += [asyncio.create_task(batcher.submit([2], soon())) for _ in range(5 * TURN)]
        await asyncio.sleep(0)
    await asyncio.gather(*others)
    assert [work.count(1) for work in passes.given[:8]] == [TURN] * 8
    assert [work.count(2) for work in passes.given[:8]] == [TURN] * 8  # nor do they wait for it


async def test_too_much_waiting_is_refused_and_forgotten_again() -> None:
    passes = Passes(open_=False)
    batcher: Batcher[int, int] = Batcher(passes, Limits(pass_texts=4, passes=1, waiting_texts=6))
    running = asyncio.create_task(batcher.submit([1] * 4, soon()))
    await settle()
    waiting = asyncio.create_task(batcher.submit([2] * 5, soon()))
    await settle()
    with pytest.raises(Overloaded, match="5 texts are waiting"):
        await batcher.submit([3] * 2, soon())
    last = asyncio.create_task(batcher.submit([4], soon()))
    await settle()
    assert not last.done()
    passes.go_on.set()
    await asyncio.gather(running, waiting, last)
    assert await batcher.submit([5] * 6, soon()) == [25] * 6
    assert 3 not in [item for work in passes.given for item in work]


async def test_a_deadline_ends_a_call_that_waits_and_frees_its_place() -> None:
    passes = Passes(open_=False)
    batcher: Batcher[int, int] = Batcher(passes, Limits(pass_texts=1, passes=1, waiting_texts=1))
    running = asyncio.create_task(batcher.submit([1], soon()))
    await settle()
    with pytest.raises(DeadlineExceeded):
        await batcher.submit([2], Deadline.after(0.02))
    later = asyncio.create_task(batcher.submit([3], soon()))
    await settle()
    passes.go_on.set()
    assert await asyncio.gather(running, later) == [[1], [9]]
    assert passes.given == [[1], [3]]


async def test_a_deadline_ends_a_call_that_is_computed() -> None:
    passes = Passes(open_=False)
    batcher: Batcher[int, int] = Batcher(passes)
    with pytest.raises(DeadlineExceeded):
        await batcher.submit([1], Deadline.after(0.02))
    await settle()
    assert passes.cancelled == 1


async def test_nothing_is_computed_for_a_deadline_that_has_passed() -> None:
    passes = Passes()
    batcher: Batcher[int, int] = Batcher(passes)
    with pytest.raises(DeadlineExceeded):
        await batcher.submit([1], Deadline.after(0.0))
    await settle()
    assert passes.given == []
    assert await batcher.submit([2], soon()) == [4]


async def test_a_pass_gets_the_latest_deadline_of_its_callers() -> None:
    passes = Passes(open_=False)
    batcher: Batcher[int, int] = Batcher(passes, Limits(passes=1))
    deadlines = [Deadline.after(WAIT_S + extra) for extra in (0, 1, 3, 2)]
    tasks = await one_then(batcher, [[1]] * 4, deadlines)
    passes.go_on.set()
    await asyncio.gather(*tasks)
    assert passes.deadlines == [deadlines[0], deadlines[2]]


async def test_a_cancelled_caller_frees_its_place() -> None:
    passes = Passes(open_=False)
    batcher: Batcher[int, int] = Batcher(passes, Limits(pass_texts=1, passes=1, waiting_texts=2))
    running = asyncio.create_task(batcher.submit([1], soon()))
    await settle()
    gone = asyncio.create_task(batcher.submit([2, 2], soon()))
    await settle()
    gone.cancel()
    await settle()
    assert gone.cancelled()
    stays = asyncio.create_task(batcher.submit([3, 3], soon()))
    await settle()
    passes.go_on.set()
    assert await asyncio.gather(running, stays) == [[1], [9, 9]]
    assert passes.given == [[1], [3], [3]]


async def test_a_pass_that_nobody_waits_for_is_cancelled() -> None:
    passes = Passes(open_=False)
    batcher: Batcher[int, int] = Batcher(passes, Limits(passes=1))
    first = asyncio.create_task(batcher.submit([0], soon()))
    await settle()
    pair = [asyncio.create_task(batcher.submit([number], soon())) for number in (1, 2)]
    await settle()
    first.cancel()
    await settle()
    assert passes.cancelled == 1
    assert passes.given == [[0], [1, 2]]
    pair[0].cancel()
    await settle()
    assert passes.cancelled == 1, "the other caller still waits for this pass"
    passes.go_on.set()
    assert await pair[1] == [4]


async def test_the_error_of_one_text_fails_its_call_only() -> None:
    passes = Passes(open_=False)
    batcher: Batcher[int, int] = Batcher(passes, Limits(passes=1))
    tasks = await one_then(batcher, [[0], [1, -2, 3], [4], [-5]])
    passes.go_on.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert passes.given[1] == [1, -2, 3, 4, -5]
    assert results[0] == [0]
    assert results[2] == [16]
    assert [str(results[index]) for index in (1, 3)] == [
        "texts[1]: -2 is below zero",
        "texts[0]: -5 is below zero",
    ]
    assert all(isinstance(results[index], InvalidInput) for index in (1, 3))


async def test_a_call_that_failed_is_computed_no_further() -> None:
    passes = Passes()
    batcher: Batcher[int, int] = Batcher(passes, Limits(pass_texts=TURN, passes=1))
    with pytest.raises(InvalidInput):
        await batcher.submit([-1] * TURN + [2] * (20 * TURN), soon())
    assert await batcher.submit([3], soon()) == [9]
    assert len(passes.given) < 5


@pytest.mark.parametrize("error", [Unavailable("nobody", "gating"), ZeroDivisionError("a defect")])
async def test_the_failure_of_a_pass_reaches_every_member(error: Exception) -> None:
    go_on = asyncio.Event()
    passes = 0

    async def run(work: list[int], deadline: Deadline) -> list[int]:
        nonlocal passes
        passes += 1
        await go_on.wait()
        if 1 in work:
            raise error
        return work

    batcher: Batcher[int, int] = Batcher(run, Limits(passes=1))
    tasks = await one_then(batcher, [[0], [1], [2]])
    go_on.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert passes == 2
    assert results == [[0], error, error]
    assert await batcher.submit([5], soon()) == [5]


async def test_a_pass_that_ends_in_an_unforeseen_way_keeps_nobody_waiting() -> None:
    async def cancels_itself(work: list[int], deadline: Deadline) -> list[int]:
        raise asyncio.CancelledError

    async def forgets_one(work: list[int], deadline: Deadline) -> list[int]:
        return work[1:]

    for run, error in ((cancels_itself, RuntimeError), (forgets_one, ValueError)):
        batcher: Batcher[int, int] = Batcher(run)
        async with asyncio.timeout(1):
            with pytest.raises(error):
                await batcher.submit([1, 2], soon())


async def test_no_work_is_no_pass() -> None:
    passes = Passes()
    assert await Batcher(passes).submit([], soon()) == []
    assert passes.given == []


async def test_nothing_is_left_behind() -> None:
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    before = asyncio.all_tasks()
    passes = Passes(open_=False)
    batcher: Batcher[int, int] = Batcher(passes, Limits(pass_texts=4, passes=2, waiting_texts=100))
    tasks = [asyncio.create_task(batcher.submit([number, -number, number], soon())) for number in range(12)]
    late = [asyncio.create_task(batcher.submit([1], Deadline.after(0.01))) for _ in range(3)]
    await settle()
    for task in tasks[::3]:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    passes.go_on.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    await settle()
    assert asyncio.all_tasks() == before
    assert batcher._waiting.texts == 0
    assert not batcher._waiting
    assert not batcher._passes
    gc.collect()
    assert complaints == []


async def _everything_is_answered(sizes: list[int], limits: Limits) -> None:
    passes = Passes()
    batcher: Batcher[int, int] = Batcher(passes, limits)
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    works = [list(range(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    async with asyncio.timeout(WAIT_S):
        answers = await asyncio.gather(*(batcher.submit(work, soon()) for work in works))
    assert answers == [[item * item for item in work] for work in works]
    assert sorted(item for work in passes.given for item in work) == list(range(sum(sizes)))
    assert max(map(len, passes.given)) <= limits.pass_texts
    assert passes.most_at_once <= (limits.passes or MOST_LEVEL)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=12),
    pass_texts=st.integers(1, 50),
    passes=st.integers(0, 4),
)
def test_every_text_is_computed_once_whatever_the_calls(sizes: list[int], pass_texts: int, passes: int) -> None:
    asyncio.run(_everything_is_answered(sizes, Limits(pass_texts, passes)))
