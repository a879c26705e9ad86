from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import (
    CorruptReply,
    DeadlineExceeded,
    InvalidInput,
    MeshError,
    NotFinite,
    Overloaded,
    Unavailable,
)
from expertmesh.rpc.deadline import Deadline
from expertmesh.serving import scheduler as module
from expertmesh.serving.generation import NO_LOGPROBS, Generation, Token, Wish
from expertmesh.serving.passes import Provenance
from expertmesh.serving.scheduler import MAX_REBUILDS, Home, HomeLost, Scheduler, StepLimits
from expertmesh.serving.steps import Work, plan_step
from expertmesh.v1.inference_pb2 import FINISH_REASON_LENGTH, FINISH_REASON_STOP, ROUTE_MESH
from expertmesh.v1.sampling_pb2 import Sampling, TokenLogprobs

MESH = Provenance(ROUTE_MESH, True, "cpu")
VOCAB = 1009
POISON = VOCAB + 1  # an id of which something comes that is not finite
LIMITS = StepLimits()


def wish(prompt: int | Sequence[int], max_tokens: int = 4, wait_s: float = 10, end_ids: Sequence[int] = ()) -> Wish:
    ids = list(range(1, prompt + 1)) if isinstance(prompt, int) else list(prompt)
    deadline = Deadline.after(wait_s)
    return Wish(ids, Sampling(repetition_penalty=1), 0, max_tokens, frozenset(end_ids), NO_LOGPROBS, deadline)


def follower(ids: Sequence[int]) -> int:
    """The token behind some ids; it depends on every one of them and on their order."""
    value = 7
    for one in ids:
        value = (value * 31 + one) % VOCAB
    return value


def followers(asked: Wish) -> list[int]:
    ids = list(asked.prompt)
    for _ in range(asked.max_tokens):
        ids.append(follower(ids))
    return ids[len(asked.prompt) :]


class Keeper:
    """A home that keeps ids in place of keys and values, and computes a step when it is allowed to.

    Args:
        room: Most sequences that it holds.
    """

    def __init__(self, room: int = 100) -> None:
        self.is_live = True
        self.room = room
        self.cached: dict[bytes, tuple[int, list[int]]] = {}
        self.steps: list[list[Work]] = []
        self.opened: list[bytes] = []
        self.turns = asyncio.Semaphore(10**6)
        self.arrived = asyncio.Event()
        self.fails: list[BaseException] = []

    async def open(self, generation: Generation) -> None:
        if not self.is_live:
            raise HomeLost("gone")
        await asyncio.sleep(0)
        self.opened.append(generation.id)
        known = self.cached.get(generation.id)
        if known is not None and known[0] == generation.epoch:
            return
        if len(self.cached) >= self.room:
            raise Overloaded("full", 0.1)
        self.cached[generation.id] = (generation.epoch, [])

    async def release(self, generations: Sequence[Generation]) -> None:
        for generation in generations:
            self.cached.pop(generation.id, None)

    async def step(self, work: Sequence[Work]) -> tuple[list[TokenLogprobs], Provenance]:
        self.steps.append(list(work))
        self.arrived.set()
        await self.turns.acquire()
        if self.fails:
            raise self.fails.pop(0)
        if any(POISON in piece.ids for piece in work):
            raise NotFinite("rows holds values that are not finite")
        if not self.is_live:
            raise HomeLost("gone")
        drawn = []
        for piece in work:
            epoch, ids = self.cached[piece.generation.id]
            assert epoch == piece.generation.epoch
            assert len(ids) == piece.generation.cached
            ids += piece.ids
            if piece.draws:
                drawn.append(TokenLogprobs(id=follower(ids)))
        return drawn, MESH

    def pause(self) -> None:
        self.turns = asyncio.Semaphore(0)

    def lengths(self) -> list[list[tuple[int, int]]]:
        """Of each step (length of the prompt, rows)."""
        return [[(len(piece.generation.wish.prompt), piece.rows) for piece in work] for work in self.steps]


@asynccontextmanager
async def scheduling(*homes: Home, limits: StepLimits = LIMITS) -> AsyncIterator[Scheduler]:
    """A scheduler, behind which no task is left."""
    before = asyncio.all_tasks()
    scheduler = Scheduler(lambda: homes, limits, lambda: Unavailable("no home is live", "gating"))
    yield scheduler
    scheduler.close()
    await asyncio.sleep(0.01)
    assert asyncio.all_tasks() == before


async def drawn(scheduler: Scheduler, asked: Wish) -> list[int]:
    async with aclosing(scheduler.generate(asked)) as tokens:
        return [token.drawn.id async for token in tokens]


async def turns(home: Keeper, steps: int) -> None:
    """Lets so many more steps happen, and waits until the next one has begun."""
    for _ in range(steps):
        home.arrived.clear()
        home.turns.release()
        async with asyncio.timeout(5):
            await home.arrived.wait()


async def begun(home: Keeper) -> None:
    async with asyncio.timeout(5):
        await home.arrived.wait()


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
    async with scheduling(home, limits=StepLimits(rows=10)) as scheduler:
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
    async with scheduling(home, limits=StepLimits(rows=4, sequences=100)) as scheduler:
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
    async with scheduling(home, limits=StepLimits(rows=4, sequences=100)) as scheduler:
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
    home.fails = [HomeLost("again") for _ in range(MAX_REBUILDS + 1)]
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
    async with scheduling(home, limits=StepLimits(rows=4)) as scheduler:
        wishes = [wish(number, 2) for number in (40, 60, 50)]
        answers = await asyncio.gather(*(drawn(scheduler, one) for one in wishes))
    assert answers == [followers(one) for one in wishes]
    silent = [one for work in home.steps[:5] for one in home.cached if one not in {p.generation.id for p in work}]
    assert silent == []
    assert len(home.opened) > 2 * len(home.steps)  # each of the three but the one or two at work


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
    async with scheduling(home, limits=StepLimits(rows=4)) as scheduler:
        wishes = [wish(number, 2) for number in (40, 60, 50)]
        assert await asyncio.gather(*(drawn(scheduler, one) for one in wishes)) == [followers(one) for one in wishes]
    assert refusals == []


@settings(max_examples=25, deadline=None)
@given(
    needs=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=12),
    rows=st.integers(1, 24),
    room=st.integers(1, 4),
    losses=st.lists(st.integers(0, 30), max_size=4),
)
def test_whatever_is_lost_whenever_the_tokens_are_the_same(
    needs: list[tuple[int, int]], rows: int, room: int, losses: list[int]
) -> None:
    class Forgetful(Keeper):
        async def step(self, work: Sequence[Work]) -> tuple[list[TokenLogprobs], Provenance]:
            if len(self.steps) in losses:
                losses.remove(len(self.steps))
                self.cached.clear()
                raise HomeLost("forgot")
            return await super().step(work)

    async def run() -> None:
        homes = [Forgetful(room), Forgetful(room)]
        async with scheduling(*homes, limits=StepLimits(rows=rows)) as scheduler:
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
        async def step(self, work: Sequence[Work]) -> tuple[list[TokenLogprobs], Provenance]:
            drawn, _ = await super().step(work)
            profile = "cpu-fp32 A" if len(self.steps) != 2 else "cpu-fp32 B"
            return drawn, Provenance(ROUTE_MESH, True, profile)

    async with scheduling(Mixed()) as scheduler, aclosing(scheduler.generate(wish(3, 4))) as tokens:
        provenances = [token.provenance async for token in tokens]
    assert [one.exact for one in provenances] == [True, False, False, False]
    assert provenances[0].profile == "cpu-fp32 A"
    assert {one.profile for one in provenances[1:]} == {"cpu-fp32 A + cpu-fp32 B"}


async def test_chunks_of_a_prompt_count_as_well() -> None:
    class Mixed(Keeper):
        async def step(self, work: Sequence[Work]) -> tuple[list[TokenLogprobs], Provenance]:
            drawn, _ = await super().step(work)
            return drawn, Provenance(ROUTE_MESH, True, f"cpu-fp32 {min(len(self.steps), 2)}")

    limits = StepLimits(rows=4)
    async with scheduling(Mixed(), limits=limits) as scheduler, aclosing(scheduler.generate(wish(6, 2))) as tokens:
        assert [token.provenance.exact async for token in tokens] == [False, False]
