from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.errors import (
    InvalidInput,
    Overloaded,
)
from expertmesh.serving.generation import Generation, Token
from expertmesh.serving.scheduler import StepLimits
from expertmesh.serving.steps import plan_step
from expertmesh.v1.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP
from tests.doubles.keeper import Keeper, begun, drawn, followers, scheduling, turns, wish

# What shares a step.


@given(needs=st.lists(st.one_of(st.just(1), st.integers(1, 3000)), min_size=1, max_size=60), spare=st.integers(0, 400))
def test_a_step_has_a_row_for_each_that_decodes_and_never_too_many(needs: list[int], spare: int) -> None:
    rows = len(needs) + spare
    running = [Generation(wish(need)) for need in needs]
    work = plan_step(running, rows)
    assert sum(piece.rows for piece in work) == min(rows, sum(needs))  # no row is left unused
    assert len({id(piece.generation) for piece in work}) == len(work)
    assert all(1 <= piece.rows <= piece.generation.missing for piece in work)
    assert all(piece.draws == (piece.rows == piece.generation.missing) for piece in work)
    at_work = {id(piece.generation): piece.rows for piece in work}
    assert all(id(one) in at_work for one in running if one.missing == 1)
    prompts = [one for one in running if one.missing > 1]
    if prompts:
        left = rows - needs.count(1)
        assert at_work[id(prompts[0])] >= min(prompts[0].missing, left / 2)


def test_a_short_prompt_joins_the_step_of_long_ones() -> None:
    running = [Generation(wish(need)) for need in (5000, 1, 4000, 20, 1)]
    work = {len(piece.generation.wish.prompt): piece for piece in plan_step(running, 256)}
    assert work[20].draws
    assert {length: piece.rows for length, piece in work.items()} == {1: 1, 20: 20, 5000: 127, 4000: 107}


# Steps one after another.


async def test_tokens_are_those_of_each_alone_however_they_share_steps() -> None:
    home = Keeper()
    wishes = [wish(prompt, most) for prompt, most in ((1, 9), (300, 3), (17, 1), (64, 20), (2, 2), (1000, 5))]
    async with scheduling(home, limits=StepLimits(rows=32)) as scheduler:
        answers = await asyncio.gather(*(drawn(scheduler, one) for one in wishes))
    assert answers == [followers(one) for one in wishes]
    assert max(sum(piece.rows for piece in work) for work in home.steps) == 32
    assert home.cached == {}


async def test_a_long_prompt_does_not_stall_those_that_run_and_a_new_one_joins_the_next_step() -> None:
    home = Keeper()
    home.pause()
    async with scheduling(home, limits=StepLimits(rows=10, micro_batches=1)) as scheduler:
        running = asyncio.create_task(drawn(scheduler, wish(3, 40)))
        await begun(home)
        await turns(home, 2)
        long = asyncio.create_task(drawn(scheduler, wish(60, 1)))
        await asyncio.sleep(0)
        await turns(home, 2)
        new = asyncio.create_task(drawn(scheduler, wish(2, 2)))
        await asyncio.sleep(0)
        await turns(home, 2)
        assert home.lengths() == [
            [(3, 3)],
            [(3, 1)],
            [(3, 1)],  # under way when the long one came
            [(3, 1), (60, 9)],
            [(3, 1), (60, 9)],  # under way when the new one came
            [(3, 1), (60, 7), (2, 2)],
            [(3, 1), (2, 1), (60, 8)],
        ]
        for _ in range(100):
            home.turns.release()
        for task in (running, long, new):
            await task


async def test_whoever_came_first_is_served_first_where_there_is_no_room_for_all() -> None:
    home = Keeper(room=2)
    ended: list[int] = []

    async def one(number: int) -> None:
        await drawn(scheduler, wish(number + 1, 3))
        ended.append(number)

    async with scheduling(home) as scheduler:
        tasks = []
        for number in range(8):
            tasks.append(asyncio.create_task(one(number)))
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
    assert ended == sorted(ended)
    assert max(len(work) for work in home.steps) == 2


async def test_no_sequence_that_runs_waits_for_a_row() -> None:
    home = Keeper()
    async with scheduling(home, limits=StepLimits(rows=4, sequences=100, micro_batches=1)) as scheduler:
        wishes = [wish(number, 6) for number in range(1, 12)]
        answers = await asyncio.gather(*(drawn(scheduler, one) for one in wishes))
    assert answers == [followers(one) for one in wishes]
    assert max(sum(piece.rows for piece in work) for work in home.steps) == 4
    for one in {piece.generation for work in home.steps for piece in work}:
        mine = [number for number, work in enumerate(home.steps) if any(piece.generation is one for piece in work)]
        decoding = mine[-6:]
        assert decoding == list(range(decoding[0], decoding[0] + 6))  # from its first token on it is in every step


async def test_a_prompt_gets_on_however_many_decode() -> None:
    home = Keeper()
    async with scheduling(home, limits=StepLimits(rows=4, sequences=100, micro_batches=1)) as scheduler:
        wishes = [wish(40, 2), *(wish(1, 50) for _ in range(8))]
        answers = await asyncio.gather(*(drawn(scheduler, one) for one in wishes))
    assert answers == [followers(one) for one in wishes]
    lengths = home.lengths()
    ended = max(number for number, work in enumerate(lengths) if dict(work).get(40))
    assert all(dict(work).get(40, 0) >= 1 for work in lengths[:ended])
    assert ended <= 41


async def test_two_homes_share_the_load() -> None:
    homes = [Keeper(), Keeper()]
    for home in homes:
        home.pause()
    async with scheduling(*homes) as scheduler:
        tasks = [asyncio.create_task(drawn(scheduler, wish(5, 30))) for _ in range(10)]
        for home in homes:
            await begun(home)
        for _ in range(10):
            await turns(homes[0], 1)
            await turns(homes[1], 1)
        assert [len(home.cached) for home in homes] == [5, 5]
        for home in homes:
            for _ in range(100):
                home.turns.release()
        await asyncio.gather(*tasks)


async def test_too_many_that_wait_are_refused_and_told_to_come_again() -> None:
    home = Keeper(room=1)
    home.pause()
    async with scheduling(home, limits=StepLimits(waiting=3)) as scheduler:
        first = asyncio.create_task(drawn(scheduler, wish(1, 2)))
        await begun(home)
        others = [asyncio.create_task(drawn(scheduler, wish(1, 2))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded, match="waiting already") as caught:
            await drawn(scheduler, wish(1, 2))
        assert caught.value.retry_after_s > 0
        for _ in range(100):
            home.turns.release()
        await asyncio.gather(first, *others)


async def test_what_can_never_be_opened_fails_alone() -> None:
    class Choosy(Keeper):
        async def open(self, generation: Generation) -> None:
            if len(generation.wish.prompt) == 13:
                raise InvalidInput("never", "tokens")
            await super().open(generation)

    home = Choosy()
    async with scheduling(home) as scheduler:
        well = asyncio.create_task(drawn(scheduler, wish(2)))
        with pytest.raises(InvalidInput, match="never"):
            await drawn(scheduler, wish(13))
        assert await well == followers(wish(2))


async def test_an_end_token_ends_it_and_nothing_is_drawn_behind_it() -> None:
    expected = followers(wish(3, 10))
    home = Keeper()
    asked = wish(3, 10, end_ids=[expected[4]])
    async with scheduling(home) as scheduler, aclosing(scheduler.generate(asked)) as tokens:
        given = [token async for token in tokens]
    assert [token.drawn.id for token in given] == expected[:5]
    assert given[-1].finish == FINISH_REASON_STOP
    assert {token.finish for token in given[:-1]} == {0}


async def test_the_last_token_of_all_says_so() -> None:
    home = Keeper()
    async with scheduling(home) as scheduler, aclosing(scheduler.generate(wish(3, 2))) as tokens:
        given: list[Token] = [token async for token in tokens]
    assert [token.finish for token in given] == [0, FINISH_REASON_LENGTH]
