"""A home of sequences that keeps ids in place of keys and values; and schedulers of such homes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager

from expertmesh.errors import (
    NotFinite,
    Overloaded,
    Unavailable,
)
from expertmesh.rpc.deadline import Deadline
from expertmesh.serving.generation import NO_LOGPROBS, Generation, Wish
from expertmesh.serving.home import Home, HomeLost
from expertmesh.serving.passes import Provenance
from expertmesh.serving.scheduler import Scheduler, StepLimits
from expertmesh.serving.steps import Work
from expertmesh.v1.inference_pb2 import ROUTE_MESH
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
        self.is_leaving = False  # it does not take sequences, and goes on with those it has
        self.room = room
        self.cached: dict[bytes, tuple[int, list[int]]] = {}
        self.steps: list[list[Work]] = []
        self.opened: list[bytes] = []
        self.turns = asyncio.Semaphore(10**6)
        self.arrived = asyncio.Event()
        self.fails: list[BaseException] = []
        self.at_work: list[list[Work]] = []
        self.most_at_work = 0
        self.lasts = 0  # turns of the event loop that a step takes

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

    async def step(self, work: Sequence[Work]) -> tuple[list[TokenLogprobs], Sequence[Provenance]]:
        self.steps.append(list(work))
        others = {piece.generation for step in self.at_work for piece in step}
        assert others.isdisjoint(piece.generation for piece in work), "a sequence is in two steps"
        self.at_work.append(list(work))
        self.most_at_work = max(self.most_at_work, len(self.at_work))
        self.arrived.set()
        try:
            for _ in range(self.lasts):
                await asyncio.sleep(0)
            await self.turns.acquire()
        finally:
            self.at_work.remove(list(work))
        if self.fails:
            raise self.fails.pop(0)
        if any(POISON in piece.ids for piece in work):
            raise NotFinite("rows holds values that are not finite")
        if not self.is_live and not self.is_leaving:
            raise HomeLost("gone")
        drawn = []
        for piece in work:
            epoch, ids = self.cached[piece.generation.id]
            assert epoch == piece.generation.epoch
            assert len(ids) == piece.generation.cached
            ids += piece.ids
            if piece.draws:
                drawn.append(TokenLogprobs(id=follower(ids)))
        return drawn, [MESH] * len(work)

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
