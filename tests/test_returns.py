from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

import pytest

from expertmesh.rpc.deadline import Deadline
from expertmesh.serving.batcher import Batcher, Limits
from expertmesh.serving.returns import MOST_WAIT_S, WAIT_SHARE, Returns
from tests.doubles.simulated_time import run_simulated


class Timed:
    """Passes that take a fixed time and some for each text, on the event loop's clock."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    async def __call__(self, work: list[int], deadline: Deadline) -> Sequence[int]:
        self.sizes.append(len(work))
        await asyncio.sleep(0.02 + 0.002 * len(work))
        return work


@pytest.mark.parametrize("passes", [1, 2])
def test_callers_that_come_back_share_a_pass_again(passes: int) -> None:
    timed = Timed()

    async def main() -> float:
        batcher: Batcher[int, int] = Batcher(timed, Limits(passes=passes))
        dice = random.Random(1)

        async def caller() -> None:
            for _ in range(40):
                await batcher.submit([1], Deadline.after(60))
                await asyncio.sleep(dice.uniform(0.0005, 0.004))

        started_s = asyncio.get_running_loop().time()
        await asyncio.gather(*(caller() for _ in range(32)))
        return asyncio.get_running_loop().time() - started_s

    took_s = run_simulated(main())
    settled = timed.sizes[10:-10]
    assert sum(settled) / len(settled) >= 0.85 * 32 / passes
    assert took_s < 40 * (0.02 + 0.002 * 32 + 0.006)


@pytest.mark.parametrize("per_s", [20, 100, 300])
def test_callers_that_come_by_themselves_never_wait(per_s: float) -> None:
    """A pass starts at once when one arrives while none is under way."""
    timed = Timed()
    idle_waits_s: list[float] = []

    async def main() -> None:
        batcher: Batcher[int, int] = Batcher(timed, Limits(passes=1))
        dice = random.Random(2)
        tasks = []

        async def caller() -> None:
            before, came_s = len(timed.sizes), asyncio.get_running_loop().time()
            is_idle = not batcher._passes and not batcher._waiting
            task = asyncio.ensure_future(batcher.submit([1], Deadline.after(60)))
            while is_idle and len(timed.sizes) == before:
                await asyncio.sleep(0.0001)
            if is_idle:
                idle_waits_s.append(asyncio.get_running_loop().time() - came_s)
            await task

        for _ in range(400):
            await asyncio.sleep(dice.expovariate(per_s))
            tasks.append(asyncio.create_task(caller()))
        await asyncio.gather(*tasks)

    run_simulated(main())
    assert idle_waits_s
    late = [wait_s for wait_s in idle_waits_s if wait_s > 0.0002]
    assert len(late) <= 0.05 * len(idle_waits_s)
    assert max(idle_waits_s) <= MOST_WAIT_S + 0.0002


def test_one_caller_never_waits() -> None:
    now_s = 0.0
    returns = Returns(lambda: now_s)
    for _ in range(100):
        returns.answered(1, 1.0)
        now_s += 0.001
        assert returns.wait_s() == 0
        returns.came()
        now_s += 1.0


def test_the_wait_ends_when_all_are_back_or_the_time_is_over() -> None:
    now_s = 0.0
    returns = Returns(lambda: now_s)
    for _ in range(3):
        returns.answered(4, 0.05)
        for _ in range(4):
            returns.came()
    returns.answered(4, 0.05)
    assert returns.wait_s() == pytest.approx(WAIT_SHARE * 0.05)
    for _ in range(3):
        returns.came()
    now_s = 0.01
    assert returns.wait_s() == pytest.approx(WAIT_SHARE * 0.05 - 0.01)
    returns.came()
    assert returns.wait_s() == 0
    returns.answered(4, 10.0)
    assert returns.wait_s() == pytest.approx(MOST_WAIT_S)
    now_s += MOST_WAIT_S
    assert returns.wait_s() == 0
