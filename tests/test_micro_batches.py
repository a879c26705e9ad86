from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import CorruptReply, NotFinite
from expertmesh.serving.generation import Generation
from expertmesh.serving.home import HomeLost
from expertmesh.serving.passes import Provenance
from expertmesh.serving.scheduler import StepLimits
from expertmesh.serving.steps import OLDEST_SHARE, Work, plan_share
from expertmesh.v1.sampling_pb2 import TokenLogprobs
from tests.doubles.keeper import POISON, Keeper, begun, drawn, followers, scheduling, turns, wish

TWO = StepLimits(micro_batches=2)


def station() -> Keeper:
    """A home whose steps take a few turns of the event loop."""
    home = Keeper()
    home.lasts = 5
    return home


async def test_sequences_are_divided_evenly_among_two_steps_under_way() -> None:
    home = Keeper()
    home.pause()
    wishes = [wish(number, 30) for number in range(1, 17)]
    async with scheduling(home, limits=TWO) as scheduler:
        tasks = [asyncio.create_task(drawn(scheduler, one)) for one in wishes]
        await begun(home)
        await turns(home, 12)
        while len(home.at_work) < 2:
            await asyncio.sleep(0)
        assert [len(work) for work in home.at_work] == [8, 8]
        assert len({piece.generation for work in home.at_work for piece in work}) == 16
        for _ in range(1000):
            home.turns.release()
        assert await asyncio.gather(*tasks) == [followers(one) for one in wishes]
    assert home.most_at_work == 2
    assert home.cached == {}


async def test_a_sequence_alone_has_one_step() -> None:
    home = station()
    async with scheduling(home, limits=TWO) as scheduler:
        assert await drawn(scheduler, wish(700, 5)) == followers(wish(700, 5))
    assert home.most_at_work == 1
    assert [sum(piece.rows for piece in work) for work in home.steps] == [256, 256, 188, 1, 1, 1, 1]


async def test_prompts_are_spread_over_steps() -> None:
    home = Keeper()
    home.pause()
    async with scheduling(home, limits=TWO) as scheduler:
        tasks = [asyncio.create_task(drawn(scheduler, wish(600, 1))) for _ in range(4)]
        await begun(home)
        await turns(home, 3)
        rows = [[piece.rows for piece in work] for work in home.at_work]
        assert len(rows) == 2
        assert all(sum(one) == 256 for one in rows)
        for _ in range(100):
            home.turns.release()
        await asyncio.gather(*tasks)


async def test_more_run_than_a_step_has_rows_and_take_turns() -> None:
    home = station()
    async with scheduling(home, limits=StepLimits(rows=4, micro_batches=2)) as scheduler:
        wishes = [wish(1, 20) for _ in range(8)]
        assert await asyncio.gather(*(drawn(scheduler, one) for one in wishes)) == [followers(one) for one in wishes]
    assert max(len(work) for work in home.steps) == 4
    assert home.most_at_work == 2


async def test_of_which_nothing_finite_comes_fails_alone_and_the_other_step_goes_on() -> None:
    home = station()
    async with scheduling(home, limits=TWO) as scheduler:
        asked = [wish(number, 30) for number in range(1, 10)]
        asked[3] = wish([5, POISON, 6])
        answers = await asyncio.gather(*(drawn(scheduler, one) for one in asked), return_exceptions=True)
    assert isinstance(answers.pop(3), NotFinite)
    assert answers == [followers(one) for one in asked if POISON not in one.prompt]
    poisoned = [len(work) for work in home.steps if any(POISON in piece.generation.wish.prompt for piece in work)]
    assert poisoned[-1] == 1
    assert poisoned == sorted(poisoned, reverse=True)
    assert len(poisoned) <= 5  # halves, and halves of these
    assert home.cached == {}


async def test_several_of_which_nothing_finite_comes_fail_alone() -> None:
    home = station()
    async with scheduling(home, limits=TWO) as scheduler:
        asked = [wish([number, POISON]) if number % 3 == 0 else wish(number, 9) for number in range(1, 20)]
        answers = await asyncio.gather(*(drawn(scheduler, one) for one in asked), return_exceptions=True)
    for one, answer in zip(asked, answers, strict=True):
        if POISON in one.prompt:
            assert isinstance(answer, NotFinite)
        else:
            assert answer == followers(one)
    assert home.cached == {}


async def test_a_step_that_fails_is_told_to_those_in_it_only() -> None:
    home = Keeper()
    home.pause()
    async with scheduling(home, limits=TWO) as scheduler:
        tasks = [asyncio.create_task(drawn(scheduler, wish(number, 9))) for number in (1, 2, 3, 4)]
        await begun(home)
        await turns(home, 8)
        while len(home.at_work) < 2:
            await asyncio.sleep(0)
        home.fails = [CorruptReply("nonsense")]
        for _ in range(100):
            home.turns.release()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(answer) for answer in answers].count(CorruptReply) == 2
    assert [answer for answer in answers if isinstance(answer, list)] != []
    assert home.cached == {}


async def test_a_home_that_is_lost_in_one_step_ends_the_other_and_all_are_computed_anew() -> None:
    ended: list[str] = []

    class Forgetful(Keeper):
        async def step(self, work: Sequence[Work]) -> tuple[list[TokenLogprobs], Sequence[Provenance]]:
            try:
                return await super().step(work)
            except HomeLost:
                self.cached.clear()
                ended.append("lost")
                raise
            except asyncio.CancelledError:
                ended.append("cancelled")
                raise

    home = Forgetful()
    home.pause()
    wishes = [wish(number, 9) for number in (1, 2, 3, 4)]
    async with scheduling(home, limits=TWO) as scheduler:
        tasks = [asyncio.create_task(drawn(scheduler, one)) for one in wishes]
        await begun(home)
        await turns(home, 6)
        while len(home.at_work) < 2:
            await asyncio.sleep(0)
        home.fails = [HomeLost("restarted")]
        home.turns.release()
        while len(ended) < 2:
            await asyncio.sleep(0)
        for _ in range(200):
            home.turns.release()
        assert await asyncio.gather(*tasks) == [followers(one) for one in wishes]
    assert ended == ["lost", "cancelled"]
    assert home.cached == {}


async def test_closing_ends_all_that_is_under_way() -> None:
    home = Keeper()
    home.pause()
    async with scheduling(home, limits=TWO) as scheduler:  # which looks at the tasks that are left
        tasks = [asyncio.create_task(drawn(scheduler, wish(number, 9))) for number in (1, 2, 3, 4)]
        await begun(home)
        await turns(home, 4)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert home.at_work == []


async def test_whoever_leaves_one_step_does_not_disturb_the_other() -> None:
    home = station()
    async with scheduling(home, limits=TWO) as scheduler:
        tasks = [asyncio.create_task(drawn(scheduler, wish(number, 40))) for number in range(1, 9)]
        while len(home.steps) < 20:
            await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        await asyncio.gather(*tasks[::2], return_exceptions=True)
        assert await asyncio.gather(*tasks[1::2]) == [followers(wish(number, 40)) for number in range(2, 9, 2)]
        while home.cached:
            await asyncio.sleep(0)


@pytest.mark.parametrize("steps", [1, 2, 4])
@settings(max_examples=60, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 12), st.integers(0, 9)), min_size=1, max_size=25),
    rows=st.integers(4, 64),
    ends=st.randoms(use_true_random=False),
)
def test_everybody_gets_on_whoever_else_comes(
    steps: int, arrivals: list[tuple[int, int, int]], rows: int, ends: object
) -> None:
    """Each arrival is (length of its prompt, tokens to generate, steps after the one before it)."""
    running: list[Generation] = []
    came: dict[Generation, tuple[int, int]] = {}  # (step, rows of those before it)
    under_way: list[list[Work]] = []
    waiting = list(arrivals)
    number, pause = 0, 0
    while waiting or running:
        while waiting and pause >= waiting[0][2] and len(running) < rows:
            length, tokens, _ = waiting.pop(0)
            generation = Generation(wish(length, tokens))
            came[generation] = (number, sum(one.missing for one in running))
            running.append(generation)
            pause = 0
        pause += 1
        while len(under_way) < min(steps, len(running)):
            idle = [one for one in running if all(one is not piece.generation for work in under_way for piece in work)]
            if not idle:
                break
            missing = sum(one.missing for one in running)
            work = plan_share(idle, len(running), missing, steps, rows)
            number += 1
            assert work
            assert sum(piece.rows for piece in work) <= rows
            assert len(work) <= -(-len(running) // min(steps, len(running)))
            for piece in work:
                piece.generation.stepped = number
            under_way.append(work)
        if not under_way:
            continue
        for piece in under_way.pop(ends.randrange(len(under_way))):  # type: ignore[attr-defined]
            generation = piece.generation
            generation.cached += piece.rows
            if piece.draws:
                generation.ids.append(1)
                if generation.generated == 1:
                    started, before = came[generation]
                    # Half of what a step leaves to prompts is the oldest one's: at least a row.
                    bound = OLDEST_SHARE * steps * (before + len(generation.wish.prompt)) + 2 * len(came) * steps
                    assert number - started <= bound
                if generation.generated == generation.wish.max_tokens:
                    running.remove(generation)
