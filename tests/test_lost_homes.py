from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from expertmesh.errors import (
    CorruptReply,
    DeadlineExceeded,
    MeshError,
    NotFinite,
    Overloaded,
    Unavailable,
)
from expertmesh.serving import lane as module
from expertmesh.serving.generation import Generation
from expertmesh.serving.home import HomeLost
from expertmesh.serving.passes import Provenance
from expertmesh.serving.rebuilds import MAX_LOSSES
from expertmesh.serving.scheduler import Scheduler, StepLimits
from expertmesh.serving.steps import Work
from expertmesh.v1.inference_pb2 import ROUTE_MESH
from expertmesh.v1.sampling_pb2 import TokenLogprobs
from tests.doubles.keeper import POISON, Keeper, begun, drawn, followers, scheduling, turns, wish

# Who leaves, and what is lost.


@pytest.mark.parametrize("moment", ["waiting", "opening", "running", "between"])
async def test_whoever_leaves_frees_everything_at_once(moment: str) -> None:
    home = Keeper(room=2)
    home.pause()
    async with scheduling(home) as scheduler:
        stays = asyncio.create_task(drawn(scheduler, wish(1, 3)))
        await begun(home)
        if moment == "waiting":
            home.room = 1
        stream = scheduler.generate(wish(2, 50))
        first = asyncio.ensure_future(anext(stream))
        await asyncio.sleep(0)
        if moment in ("running", "between"):
            await turns(home, 2)
        if moment == "between":
            await first
        elif moment == "opening":
            home.turns.release()
            await asyncio.sleep(0)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await stream.aclose()
        for _ in range(100):
            home.turns.release()
        assert await stays == followers(wish(1, 3))
        async with asyncio.timeout(5):
            while home.cached:
                await asyncio.sleep(0)


async def test_a_deadline_ends_a_sequence_that_runs_and_one_that_waits() -> None:
    home = Keeper(room=1)
    home.pause()
    async with scheduling(home) as scheduler:
        runs = asyncio.create_task(drawn(scheduler, wish(1, 3, wait_s=0.05)))
        waits = asyncio.create_task(drawn(scheduler, wish(2, 3, wait_s=0.05)))
        for task in (runs, waits):
            with pytest.raises(DeadlineExceeded):
                await task
        for _ in range(5):
            home.turns.release()
        assert await drawn(scheduler, wish(3)) == followers(wish(3))
    assert home.cached == {}


async def test_a_home_that_dies_hands_its_sequences_to_another_with_the_very_tokens() -> None:
    dies, lives = Keeper(), Keeper()
    for home in (dies, lives):
        home.pause()
    wishes = [wish(number, 12) for number in range(1, 9)]
    async with scheduling(dies, lives) as scheduler:
        tasks = [asyncio.create_task(drawn(scheduler, one)) for one in wishes]
        for home in (dies, lives):
            await begun(home)
            await turns(home, 4)
        dies.is_live = False
        dies.cached.clear()
        for home in (dies, lives):
            for _ in range(200):
                home.turns.release()
        assert await asyncio.gather(*tasks) == [followers(one) for one in wishes]
    assert lives.cached == {}


async def test_a_home_that_leaves_hands_its_sequences_over_and_they_have_the_very_tokens() -> None:
    leaves, stays = Keeper(), Keeper()
    for home in (leaves, stays):
        home.pause()
    wishes = [wish(number, 12) for number in range(1, 9)]
    async with scheduling(leaves, stays) as scheduler:
        tasks = [asyncio.create_task(drawn(scheduler, one)) for one in wishes]
        for home in (leaves, stays):
            await begun(home)
            await turns(home, 4)
        assert len(leaves.cached) == 4
        leaves.is_leaving, leaves.is_live = True, False
        scheduler.wake()
        steps = len(leaves.steps)
        for home in (leaves, stays):
            for _ in range(200):
                home.turns.release()
        assert await asyncio.gather(*tasks) == [followers(one) for one in wishes]
        assert len(leaves.steps) == steps  # what was under way has ended, and nothing more was asked of it
    assert leaves.cached == stays.cached == {}


async def test_a_home_that_leaves_keeps_those_for_which_there_is_no_room_elsewhere() -> None:
    leaves, stays = Keeper(), Keeper()
    limits = StepLimits(sequences=2)
    for home in (leaves, stays):
        home.pause()
    wishes = [wish(number, 12) for number in range(1, 5)]
    async with scheduling(leaves, stays, limits=limits) as scheduler:
        tasks = [asyncio.create_task(drawn(scheduler, one)) for one in wishes]
        for home in (leaves, stays):
            await begun(home)
        leaves.is_leaving, leaves.is_live = True, False
        scheduler.wake()
        for _ in range(200):
            leaves.turns.release()
        async with asyncio.timeout(5):
            while leaves.cached:  # they have ended there
                await asyncio.sleep(0)
        for _ in range(200):
            stays.turns.release()
        assert await asyncio.gather(*tasks) == [followers(one) for one in wishes]


async def test_a_lane_whose_home_has_left_is_over() -> None:
    homes = [Keeper(), Keeper()]
    before = asyncio.all_tasks()
    scheduler = Scheduler(lambda: tuple(homes), StepLimits(), lambda: Unavailable("no home is live", "gating"))
    assert await drawn(scheduler, wish(3)) == followers(wish(3))
    lanes = len(asyncio.all_tasks() - before)
    homes.pop().is_live = False
    scheduler.wake()
    async with asyncio.timeout(5):
        while len(asyncio.all_tasks() - before) == lanes:
            await asyncio.sleep(0)
    assert await drawn(scheduler, wish(4)) == followers(wish(4))
    scheduler.close()


async def test_a_home_that_forgets_everything_starts_its_sequences_anew() -> None:
    home = Keeper()
    home.fails = [HomeLost("it was restarted")]
    async with scheduling(home) as scheduler:
        assert await drawn(scheduler, wish(40, 6)) == followers(wish(40, 6))
    assert home.steps[1][0].rows == 40


async def test_without_any_home_it_is_said_at_once() -> None:
    home = Keeper()
    home.pause()
    async with scheduling(home) as scheduler:
        running = asyncio.create_task(drawn(scheduler, wish(2)))
        await begun(home)
        home.is_live = False
        with pytest.raises(Unavailable, match="no home is live"):
            await drawn(scheduler, wish(3))
        home.turns.release()
        with pytest.raises(Unavailable, match="no home is live"):
            await running


async def test_a_home_that_is_lost_again_and_again_is_given_up() -> None:
    home = Keeper()
    home.fails = [HomeLost("again") for _ in range(MAX_LOSSES + 1)]
    async with scheduling(home) as scheduler:
        with pytest.raises(Unavailable, match="again and again"):
            await drawn(scheduler, wish(2))
        assert await drawn(scheduler, wish(3)) == followers(wish(3))
    assert home.cached == {}


@pytest.mark.parametrize(
    ("failure", "error"),
    [
        (Unavailable("expert 3", "expert-3", 0, 3), Unavailable),
        (CorruptReply("nonsense"), CorruptReply),
        (RuntimeError("a defect"), Unavailable),
    ],
)
async def test_a_step_that_fails_is_told_to_all_that_shared_it_and_the_next_one_works(
    failure: Exception, error: type[MeshError], capfd: pytest.CaptureFixture[str]
) -> None:
    home = Keeper()
    home.pause()
    async with scheduling(home) as scheduler:
        tasks = [asyncio.create_task(drawn(scheduler, wish(number))) for number in (1, 2, 3)]
        await begun(home)
        await turns(home, 1)
        home.fails = [failure]
        home.turns.release()
        answers: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
        assert [type(answer) for answer in answers] == [error] * 3
        for _ in range(20):
            home.turns.release()
        assert await drawn(scheduler, wish(5)) == followers(wish(5))
    assert home.cached == {}


async def test_those_that_wait_for_rows_are_spoken_of_lest_they_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEEP_EVERY_S", -1.0)  # at every step
    home = Keeper()
    async with scheduling(home, limits=StepLimits(rows=4, micro_batches=1)) as scheduler:
        wishes = [wish(number, 2) for number in (40, 60, 50)]
        answers = await asyncio.gather(*(drawn(scheduler, one) for one in wishes))
    assert answers == [followers(one) for one in wishes]
    absent = sum(len(wishes) - len(work) for work in home.steps[:10])  # of which none ends before
    assert absent >= 10
    assert len(home.opened) >= len(wishes) + absent


async def test_one_that_was_forgotten_meanwhile_is_computed_anew_and_harms_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "KEEP_EVERY_S", -1.0)
    home = Keeper()
    refusals = [Overloaded("its room is taken", 0.1)]
    kept = home.open

    async def open_(generation: Generation) -> None:
        if generation.id in home.cached and len(generation.wish.prompt) == 60 and refusals:
            del home.cached[generation.id]
            raise refusals.pop()
        await kept(generation)

    monkeypatch.setattr(home, "open", open_)
    async with scheduling(home, limits=StepLimits(rows=4, micro_batches=1)) as scheduler:
        wishes = [wish(number, 2) for number in (40, 60, 50)]
        assert await asyncio.gather(*(drawn(scheduler, one) for one in wishes)) == [followers(one) for one in wishes]
    assert refusals == []


@settings(max_examples=25, deadline=None)
@given(
    needs=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=12),
    rows=st.integers(1, 24),
    room=st.integers(1, 4),
    losses=st.lists(st.integers(0, 30), max_size=4),
    micro_batches=st.integers(0, 3),
    turns=st.lists(st.integers(0, 5), min_size=1, max_size=9),
)
@example(  # two steps share a loss
    needs=[(1, 2), (1, 2), (1, 1), (1, 7), (1, 7), (12, 12), (1, 5), (1, 2), (1, 2), (1, 1)],
    rows=10,
    room=3,
    losses=[20, 1],
    micro_batches=3,
    turns=[0, 5, 0, 1],
)
def test_whatever_is_lost_whenever_the_tokens_are_the_same(
    needs: list[tuple[int, int]], rows: int, room: int, losses: list[int], micro_batches: int, turns: list[int]
) -> None:
    class Forgetful(Keeper):
        def __init__(self, room: int) -> None:
            super().__init__(room)
            self.forgotten: set[tuple[bytes, int]] = set()  # with their epochs

        async def step(self, work: Sequence[Work]) -> tuple[list[TokenLogprobs], Sequence[Provenance]]:
            for _ in range(turns[len(self.steps) % len(turns)]):
                await asyncio.sleep(0)
            if len(self.steps) in losses:
                losses.remove(len(self.steps))
                self.forgotten |= {(name, epoch) for name, (epoch, _) in self.cached.items()}
                self.cached.clear()
                raise HomeLost("forgot")
            if any((piece.generation.id, piece.generation.epoch) in self.forgotten for piece in work):
                raise HomeLost("not known any more")  # as it says to a step that shared the loss with another
            return await super().step(work)

    async def run() -> None:
        homes = [Forgetful(room), Forgetful(room)]
        async with scheduling(*homes, limits=StepLimits(rows, micro_batches=micro_batches)) as scheduler:
            wishes = [wish(*need) for need in needs]
            assert await asyncio.gather(*(drawn(scheduler, one) for one in wishes)) == [
                followers(one) for one in wishes
            ]
        assert [home.cached for home in homes] == [{}, {}]

    asyncio.run(run())
    gc.collect()


async def test_a_sequence_of_which_nothing_finite_comes_fails_alone() -> None:
    home = Keeper()
    async with scheduling(home) as scheduler:
        asked = [wish(3, 20), wish([1, POISON, 2]), wish(5, 20)]
        first, culprit, second = await asyncio.gather(*(drawn(scheduler, one) for one in asked), return_exceptions=True)
        assert isinstance(culprit, NotFinite)
        assert [first, second] == [followers(asked[0]), followers(asked[2])]
    assert any(len(work) == 3 for work in home.steps)  # they did share a step
    assert home.cached == {}


async def test_whoever_waits_for_room_hears_that_the_home_is_gone() -> None:
    home = Keeper(room=0)
    async with scheduling(home) as scheduler:
        waiting = asyncio.create_task(drawn(scheduler, wish(3, wait_s=60)))
        while not home.opened:
            await asyncio.sleep(0)
        home.is_live = False
        with pytest.raises(Unavailable, match="no home is live"):
            async with asyncio.timeout(5):
                await waiting


async def test_a_token_is_exact_only_if_all_that_it_depends_on_was_computed_alike() -> None:
    class Mixed(Keeper):
        async def step(self, work: Sequence[Work]) -> tuple[list[TokenLogprobs], Sequence[Provenance]]:
            drawn, _ = await super().step(work)
            profile = "cpu-fp32 A" if len(self.steps) != 2 else "cpu-fp32 B"
            return drawn, [Provenance(ROUTE_MESH, True, profile)] * len(work)

    async with scheduling(Mixed()) as scheduler, aclosing(scheduler.generate(wish(3, 4))) as tokens:
        provenances = [token.provenance async for token in tokens]
    assert [one.exact for one in provenances] == [True, False, False, False]
    assert provenances[0].profile == "cpu-fp32 A"
    assert {one.profile for one in provenances[1:]} == {"cpu-fp32 A + cpu-fp32 B"}


async def test_chunks_of_a_prompt_count_as_well() -> None:
    class Mixed(Keeper):
        async def step(self, work: Sequence[Work]) -> tuple[list[TokenLogprobs], Sequence[Provenance]]:
            drawn, _ = await super().step(work)
            return drawn, [Provenance(ROUTE_MESH, True, f"cpu-fp32 {min(len(self.steps), 2)}")] * len(work)

    limits = StepLimits(rows=4)
    async with scheduling(Mixed(), limits=limits) as scheduler, aclosing(scheduler.generate(wish(6, 2))) as tokens:
        assert [token.provenance.exact async for token in tokens] == [False, False]
