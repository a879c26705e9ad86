"""Sequences whose home drains or leaves: nobody loses a place before there is another."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from expertmesh.errors import Overloaded, Unavailable
from expertmesh.serving.generation import Generation
from expertmesh.serving.home import HomeLost
from expertmesh.serving.passes import Provenance
from expertmesh.serving.rebuilds import RebuildLimits
from expertmesh.serving.scheduler import Scheduler, StepLimits
from expertmesh.serving.steps import Work
from expertmesh.v1.sampling_pb2 import TokenLogprobs
from tests.doubles.keeper import Keeper, drawn, followers, scheduling, wish
from tests.doubles.simulated_time import run_simulated

STEP_S = 0.01


class Slow(Keeper):
    """Takes its time."""

    def __init__(self, room: int = 100) -> None:
        super().__init__(room)
        self.is_dead = False
        self.releasing = asyncio.Event()
        self.releases_s = 0.0

    async def release(self, generations: Sequence[Generation]) -> None:
        self.releasing.set()
        await asyncio.sleep(self.releases_s)
        await super().release(generations)

    async def step(self, work: Sequence[Work]) -> tuple[list[TokenLogprobs], Sequence[Provenance]]:
        await asyncio.sleep(STEP_S)
        if self.is_dead:
            raise HomeLost("its process ended")
        return await super().step(work)


async def until_run(home: Keeper, sequences: int) -> None:
    async with asyncio.timeout(60):
        while len(home.cached) < sequences:
            await asyncio.sleep(STEP_S)


def test_a_home_that_has_left_and_dies_then_loses_no_sequence() -> None:
    async def main() -> None:
        leaves, joins = Slow(), Slow()
        leaves.releases_s = STEP_S
        homes: list[Slow] = [leaves]
        scheduler = Scheduler(lambda: homes, StepLimits(), lambda: Unavailable("no home is live", "gating"))
        asked = [wish(number, 60) for number in (1, 2, 3, 4)]
        tasks = [asyncio.create_task(drawn(scheduler, one)) for one in asked]
        await until_run(leaves, 4)
        leaves.is_live, homes[:] = False, [joins]
        scheduler.wake()
        leaves.releasing.clear()
        leaves.is_dead = True
        await leaves.releasing.wait()
        scheduler.wake()  # as whatever happens to any replica or request does
        assert await asyncio.gather(*tasks) == [followers(one) for one in asked]
        scheduler.close()

    run_simulated(main())


def test_no_more_sequences_are_moved_than_others_have_room_for() -> None:
    async def main() -> None:
        leaves, stays = Slow(), Slow(room=3)
        stays.is_live = False
        limits = StepLimits(rebuilds=RebuildLimits(rows_per_s=50))
        async with scheduling(leaves, stays, limits=limits) as scheduler:
            asked = [wish(40, 400, wait_s=1000) for _ in range(12)]
            tasks = [asyncio.create_task(drawn(scheduler, one)) for one in asked]
            await until_run(leaves, 12)
            stays.is_live = True
            fills = [asyncio.create_task(drawn(scheduler, wish(1, 3))) for _ in range(4)]  # who finds out what it holds
            await asyncio.gather(*fills)
            leaves.is_leaving, leaves.is_live = True, False
            scheduler.wake()
            for _ in range(100):
                await asyncio.sleep(STEP_S)
                assert len(leaves.cached) >= 12 - 2 * stays.room
            assert await asyncio.gather(*tasks) == [followers(one) for one in asked]

    run_simulated(main())


def test_a_sequence_that_is_too_long_to_be_computed_anew_stays_where_it_is() -> None:
    async def main() -> None:
        leaves, stays = Slow(), Slow()
        stays.is_live = False
        limits = StepLimits(rebuilds=RebuildLimits(most_tokens=20))
        async with scheduling(leaves, stays, limits=limits) as scheduler:
            asked = [wish(30, 60), wish(2, 10)]
            tasks = [asyncio.create_task(drawn(scheduler, one)) for one in asked]
            await until_run(leaves, 2)
            stays.is_live, leaves.is_leaving, leaves.is_live = True, True, False
            scheduler.wake()
            assert await asyncio.gather(*tasks) == [followers(one) for one in asked]
        assert len(stays.opened) == 1

    run_simulated(main())


def test_a_cache_that_was_full_for_a_moment_is_used_again() -> None:
    async def main() -> None:
        home = Slow()
        async with scheduling(home) as scheduler:
            for _ in range(3):
                await drawn(scheduler, wish(2, 20))
            home.room = 0  # others have it all
            late = asyncio.create_task(drawn(scheduler, wish(2, 20, wait_s=0.5)))
            await asyncio.gather(late, return_exceptions=True)
            home.room = 100
            await asyncio.sleep(1)
            refused = 0
            for _ in range(5):
                try:
                    await drawn(scheduler, wish(2, 20, wait_s=0.45))
                except Overloaded:
                    refused += 1
            assert refused == 0

    run_simulated(main())


def test_sequences_that_became_slower_than_their_deadlines_are_heard_of() -> None:
    async def main() -> float:
        home = Slow()
        async with scheduling(home) as scheduler:
            await drawn(scheduler, wish(2, 20))
            before_s = scheduler.durations.own_s(wish(2, 20), 1)
            began_s = time.monotonic()

            async def slow(work: Sequence[Work]) -> tuple[list[TokenLogprobs], Sequence[Provenance]]:
                await asyncio.sleep(0.2)
                return await Keeper.step(home, work)

            home.step = slow  # type: ignore[method-assign]
            await asyncio.gather(drawn(scheduler, wish(2, 20, wait_s=2.0)), return_exceptions=True)
            assert time.monotonic() - began_s < 3
            after_s = scheduler.durations.own_s(wish(2, 20), 1)
        assert before_s is not None
        assert after_s is not None
        return after_s / before_s

    assert run_simulated(main()) > 2
