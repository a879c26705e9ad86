"""Load, in simulated time, that is many times what can be served."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import DeadlineExceeded, Overloaded
from expertmesh.rpc.deadline import Deadline
from expertmesh.serving.batcher import Batcher, Limits
from expertmesh.serving.passes import Provenance
from expertmesh.serving.scheduler import StepLimits
from expertmesh.serving.shedding import PATIENCE, Smoothed
from expertmesh.serving.steps import Work
from expertmesh.telemetry import metrics
from expertmesh.v1.sampling_pb2 import TokenLogprobs
from tests.doubles.keeper import Keeper, drawn, scheduling, wish
from tests.doubles.simulated_time import run_simulated

LOAD_S = 12.0
PATIENT_S = 2.0


@dataclass
class Outcome:
    """What became of the calls of one run."""

    ends: Counter[type] = field(default_factory=Counter)
    took_s: list[float] = field(default_factory=list)  # of those that were answered
    refused_s: list[float] = field(default_factory=list)  # until a refusal
    retries_s: list[float] = field(default_factory=list)
    late_s: list[float] = field(default_factory=list)  # how long after its deadline one ended

    @property
    def good(self) -> int:
        return len(self.took_s)


async def _call(outcome: Outcome, one: Callable[[], Awaitable[object]], timeout_s: float) -> None:
    loop = asyncio.get_running_loop()
    came_s = loop.time()
    try:
        await one()
    except Overloaded as error:
        outcome.ends[Overloaded] += 1
        outcome.refused_s.append(loop.time() - came_s)
        outcome.retries_s.append(error.retry_after_s)
    except DeadlineExceeded:
        outcome.ends[DeadlineExceeded] += 1
        assert loop.time() - came_s >= timeout_s - 1e-6  # only if it really passed
    else:
        outcome.took_s.append(loop.time() - came_s)
    outcome.late_s.append(loop.time() - came_s - timeout_s)


async def _arrivals(per_s: float, seed: int, one: Callable[[float], Awaitable[object]], seconds: float) -> Outcome:
    outcome = Outcome()
    dice = random.Random(seed)
    loop = asyncio.get_running_loop()
    for _ in range(3):  # so that something was measured
        await one(10 * PATIENT_S)
    stop_s, tasks = loop.time() + seconds, []
    while loop.time() < stop_s:
        await asyncio.sleep(dice.expovariate(per_s))
        timeout_s = PATIENT_S * (0.5 + dice.random())
        tasks.append(asyncio.create_task(_call(outcome, lambda timeout_s=timeout_s: one(timeout_s), timeout_s)))  # type: ignore[misc]
    await asyncio.gather(*tasks)
    return outcome


def passes(
    factor: float, seed: int, noise: float, limits: Limits, seconds: float = LOAD_S, text_s: float = 0.01
) -> Outcome:
    """Texts that come so many times as fast as they can be computed: 0.02 s a pass, and so long each text."""
    dice = random.Random(seed)

    async def run_pass(work: list[int], deadline: Deadline) -> Sequence[int]:
        await asyncio.sleep((0.02 + text_s * len(work)) * (1 + noise * dice.random()))
        return work

    async def main() -> Outcome:
        batcher: Batcher[int, int] = Batcher(run_pass, limits)

        async def one(timeout_s: float) -> object:
            return await batcher.submit([1], Deadline.after(timeout_s))

        per_s = 8 / (0.02 + 8 * text_s)
        return await _arrivals(factor * per_s * limits.passes / (1 + noise / 2), seed, one, seconds)

    return run_simulated(main())


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("limits", [Limits(pass_texts=8, passes=1), Limits(pass_texts=8, passes=2)])
def test_passes_answer_as_much_at_ten_times_the_load(noise: float, limits: Limits) -> None:
    peak = max(passes(factor, 1, noise, limits).good for factor in (0.9, 1.1, 1.3))
    over = passes(10, 1, noise, limits)
    assert over.good >= 0.9 * peak
    assert over.ends[DeadlineExceeded] <= 0.05 * over.good  # of the first few, when little was known
    assert max(over.late_s) < 0.01
    assert median(over.refused_s) == 0  # at once
    assert all(0 < retry_s < 10 for retry_s in over.retries_s)


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_passes_are_no_larger_than_deadlines_allow(noise: float) -> None:
    """A pass of all the texts that may share one would take 4.5 s, twice what callers wait."""
    runs = [passes(factor, 3, noise, Limits(), 40.0, 0.07) for factor in (0.9, 1.1, 1.3, 10)]
    assert runs[-1].good >= 0.9 * max(run.good for run in runs[:-1])
    assert runs[-1].ends[DeadlineExceeded] <= 0.12 * runs[-1].good  # of the first seconds, when little was known
    assert max(runs[-1].late_s) < 0.01


class Devices:
    """Two devices that passes take turns at, twice each; a text costs them by its length.

    So a pass takes the longer the more are under way, and one of two lengths is twice as fast as the other.
    """

    def __init__(self, dice: random.Random, noise: float) -> None:
        self._dice, self._noise = dice, noise
        self._locks = asyncio.Lock(), asyncio.Lock()

    async def __call__(self, work: list[str], deadline: Deadline) -> Sequence[str]:
        async with asyncio.timeout(max(0.0, deadline.remaining_s())):
            for lock in 2 * self._locks:
                async with lock:
                    await asyncio.sleep(
                        (0.001 + 1e-4 * sum(map(len, work))) * self._dice.lognormvariate(0, self._noise)
                    )
        return work


def flood(factor: float, seed: int, noise: float, limits: Limits, seconds: float) -> dict[int, Outcome]:
    """Texts of 50, 100 and 200 characters that come so many times as fast as one pass at once computes them."""
    dice = random.Random(seed)
    outcomes = {length: Outcome() for length in (50, 100, 200)}

    async def main() -> None:
        batcher: Batcher[str, str] = Batcher(Devices(dice, noise), limits, len)

        async def one(length: int) -> None:
            await _call(outcomes[length], lambda: batcher.submit([length * "x"], Deadline.after(PATIENT_S)), PATIENT_S)

        tasks, loop = [], asyncio.get_running_loop()
        stop_s = loop.time() + seconds
        while loop.time() < stop_s:
            tasks.append(asyncio.create_task(one(dice.choice(list(outcomes)))))
            await asyncio.sleep(0.047 / factor)
        await asyncio.gather(*tasks)

    run_simulated(main())
    return outcomes


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("noise", [0.0, 0.2])
@pytest.mark.parametrize("passes_", [0, 2])
def test_a_flood_of_passes_that_share_devices_is_answered_as_well(passes_: int, noise: float, seed: int) -> None:
    limits = Limits(passes=passes_)
    calm = flood(0.9, seed, noise, limits, 30.0)
    over = flood(10.0, seed, noise, limits, 30.0)
    good = sum(one.good for one in over.values())
    assert good >= 0.95 * sum(one.good for one in calm.values())
    assert sum(one.ends[DeadlineExceeded] for one in over.values()) <= 0.1 * good
    assert max(late_s for one in over.values() for late_s in one.late_s) < 0.01


def test_in_a_flood_long_texts_are_answered_as_often_as_short_ones() -> None:
    over = flood(10.0, 4, 0.1, Limits(passes=1), 120.0)
    shares = [one.good / len(one.late_s) for one in over.values()]
    assert max(shares) < 1.3 * min(shares)


def closed_loop(batcher: Batcher[str, str], callers: int, text: str, timeout_s: float, seconds: float) -> Counter[type]:
    """Callers that come back as soon as they are answered; gives how their calls ended."""
    ends: Counter[type] = Counter()

    async def caller() -> None:
        loop = asyncio.get_running_loop()
        stop_s = loop.time() + seconds
        while loop.time() < stop_s:
            try:
                await batcher.submit([text], Deadline.after(timeout_s))
                ends[str] += 1
            except (Overloaded, DeadlineExceeded) as error:
                ends[type(error)] += 1
                await asyncio.sleep(0.02)

    async def main() -> None:
        for _ in range(5):
            await batcher.submit([text], Deadline.after(10 * timeout_s))
        await asyncio.gather(*(caller() for _ in range(callers)))

    run_simulated(main())
    return ends


def test_single_calls_before_do_not_keep_passes_small() -> None:
    async def run_pass(work: list[str], deadline: Deadline) -> Sequence[str]:
        await asyncio.sleep(0.25)  # however many texts
        return work

    ends = closed_loop(Batcher(run_pass, Limits(), len), 30, "x", 0.5, 6.0)
    assert ends[str] > 400  # of 720


def test_passes_that_became_slower_than_deadlines_are_made_smaller() -> None:
    async def run_pass(work: list[str], deadline: Deadline) -> Sequence[str]:
        await asyncio.sleep(0.0002 * sum(map(len, work)))
        return work

    batcher: Batcher[str, str] = Batcher(run_pass, Limits(), len)
    short = closed_loop(batcher, 200, 10 * "x", 1.0, 3.0)
    assert short[str] > 500
    batcher = Batcher(run_pass, Limits(), len)

    async def main() -> int:
        """Texts get ten times as long: 64 of them take 1.28 s."""
        answered = 0
        for _ in range(20):
            await batcher.submit(["x" * 10] * 8, Deadline.after(10.0))
        stop_s = time.monotonic() + 8.0

        async def caller() -> None:
            nonlocal answered
            while time.monotonic() < stop_s:
                try:
                    await batcher.submit(["x" * 100], Deadline.after(1.0))
                    answered += 1
                except (Overloaded, DeadlineExceeded):
                    await asyncio.sleep(0.02)

        await asyncio.gather(*(caller() for _ in range(200)))
        return answered

    assert run_simulated(main()) > 100  # of 400


def test_nobody_is_refused_whom_there_is_time_for() -> None:
    calm = passes(0.7, 2, 0.5, Limits(pass_texts=8, passes=1))
    assert set(calm.ends) == set()
    assert calm.good > 400


class Station(Keeper):
    """Takes its time for steps: a fixed part, and some for each row."""

    async def step(self, work: Sequence[Work]) -> tuple[list[TokenLogprobs], Sequence[Provenance]]:
        await asyncio.sleep(0.012 + 0.001 * sum(piece.rows for piece in work))
        return await super().step(work)


def generations(factor: float, seed: int, room: int = 8) -> Outcome:
    """Sequences of 20 tokens that come so many times as fast as they can be computed: 8 at once in about 0.4 s."""

    async def main() -> Outcome:
        home = Station(room)
        async with scheduling(home, limits=StepLimits(sequences=8, micro_batches=1)) as scheduler:

            async def one(timeout_s: float) -> object:
                return await drawn(scheduler, wish(8, 20, wait_s=timeout_s))

            outcome = await _arrivals(factor * 18, seed, one, LOAD_S)
            assert not home.cached
            return outcome

    return run_simulated(main())


@pytest.mark.parametrize("room", [8, 6])
def test_generation_answers_as_much_at_ten_times_the_load(room: int) -> None:
    peak = max(generations(factor, 1, room).good for factor in (0.7, 0.9, 1.1))
    over = generations(10, 1, room)
    assert over.good >= 0.9 * peak
    assert over.ends[DeadlineExceeded] <= 0.05 * over.good  # of the first few, when little was known
    assert max(over.late_s) < 0.01
    assert median(over.refused_s) == 0


def answered_tokens(per_s: float, seed: int, micro_batches: int, seconds: float) -> tuple[dict[int, Outcome], int]:
    """Sequences of 10, 20 and 40 tokens; by tokens what became of them, and tokens of those that were answered.

    Their home has room for all, and steps of more than 88 rows are too slow for 40 tokens within 4 s.
    """
    dice = random.Random(seed)
    outcomes = {tokens: Outcome() for tokens in (10, 20, 40)}
    locks = asyncio.Lock(), asyncio.Lock()

    class Stages(Keeper):
        async def step(self, work: Sequence[Work]) -> tuple[list[TokenLogprobs], Sequence[Provenance]]:
            for lock in locks:
                async with lock:
                    await asyncio.sleep(
                        (0.006 + 0.0005 * sum(piece.rows for piece in work)) * (0.8 + 0.4 * dice.random())
                    )
            return await super().step(work)

    async def main() -> None:
        home = Stages()
        async with scheduling(home, limits=StepLimits(micro_batches=micro_batches)) as scheduler:
            tasks, loop = [], asyncio.get_running_loop()
            stop_s = loop.time() + seconds
            while loop.time() < stop_s:
                tokens = dice.choice(list(outcomes))
                one = partial(drawn, scheduler, wish(8, tokens, wait_s=4.0))
                tasks.append(asyncio.create_task(_call(outcomes[tokens], one, 4.0)))
                await asyncio.sleep(1 / per_s)
            await asyncio.gather(*tasks)

    run_simulated(main())
    return outcomes, sum(tokens * outcome.good for tokens, outcome in outcomes.items())


@pytest.mark.parametrize("micro_batches", [1, 0])
def test_sequences_that_run_are_no_more_than_deadlines_allow(micro_batches: int) -> None:
    _, calm = answered_tokens(18.0, 1, micro_batches, 15.0)
    over, tokens = answered_tokens(180.0, 1, micro_batches, 15.0)
    assert tokens >= 0.9 * calm
    good, late = sum(one.good for one in over.values()), sum(one.ends[DeadlineExceeded] for one in over.values())
    assert late <= 0.05 * good
    shares = [one.good / len(one.late_s) for one in over.values()]
    assert min(shares) > 0.25 * max(shares)  # long ones are answered, too
    assert max(late_s for one in over.values() for late_s in one.late_s) < 0.01


def test_a_burst_of_patient_sequences_runs_together_at_once() -> None:
    async def main() -> int:
        home = Station(100)
        async with scheduling(home) as scheduler:
            for _ in range(5):
                await drawn(scheduler, wish(8, 64, wait_s=60.0))
            await asyncio.gather(*(drawn(scheduler, wish(8, 64, wait_s=60.0)) for _ in range(32)))
        return max(len(step) for step in home.steps)

    assert run_simulated(main()) == 32


def test_no_sequence_is_refused_for_which_there_is_time() -> None:
    calm = generations(0.6, 2)
    assert set(calm.ends) == set()
    assert calm.good > 100


def test_a_burst_at_the_start_is_never_refused() -> None:
    async def main() -> list[object]:
        async with scheduling(Station(), limits=StepLimits(sequences=4)) as scheduler:
            asked = [drawn(scheduler, wish(8, 20, wait_s=2.0)) for _ in range(60)]
            return list(await asyncio.gather(*asked, return_exceptions=True))

    ends = run_simulated(main())
    assert sum(isinstance(one, list) for one in ends) >= 16
    refusals = [one for one in ends if isinstance(one, Overloaded)]
    assert all("it waited" in str(one) for one in refusals)  # nothing was known when they came
    assert len(refusals) > 10


def test_one_slow_pass_does_not_refuse_for_ever() -> None:
    async def run_pass(work: list[int], deadline: Deadline) -> Sequence[int]:
        await asyncio.sleep(100.0 if 0 in work else 0.01)
        return work

    async def main() -> None:
        batcher: Batcher[int, int] = Batcher(run_pass)
        await batcher.submit([0], Deadline.after(1000))
        for _ in range(10):
            assert await batcher.submit([1], Deadline.after(1)) == [1]

    run_simulated(main())


def test_what_waited_too_long_is_dropped_for_those_that_can_make_it() -> None:
    async def run_pass(work: list[int], deadline: Deadline) -> Sequence[int]:
        await asyncio.sleep(1.8 if 1 in work else 0.1)
        return work

    async def main() -> list[object]:
        batcher: Batcher[int, int] = Batcher(run_pass, Limits(pass_texts=1))
        await batcher.submit([0], Deadline.after(10))
        calls = []
        for number, timeout_s in ((1, 10.0), (2, 1.9), (3, 10.0)):
            calls.append(asyncio.create_task(batcher.submit([number], Deadline.after(timeout_s))))
        return list(await asyncio.gather(*calls, return_exceptions=True))

    before = metrics.SHED.labels("pass", "dropped")._value.get()
    first, second, third = run_simulated(main())
    assert first == [1]
    assert isinstance(second, Overloaded)
    assert second.retry_after_s > 0
    assert third == [3]
    assert metrics.SHED.labels("pass", "dropped")._value.get() == before + 1


@settings(max_examples=15, deadline=None)
@given(
    factor=st.floats(0.2, 8),
    noise=st.floats(0, 2),
    seed=st.integers(0, 99),
    passes_=st.integers(1, 3),
    waiting=st.integers(1, 3000),
)
def test_every_call_ends_by_its_deadline(factor: float, noise: float, seed: int, passes_: int, waiting: int) -> None:
    outcome = passes(factor, seed, noise, Limits(8, passes=passes_, waiting_texts=waiting), 2.0)
    assert max(outcome.late_s) < 0.01


def test_a_mean_follows() -> None:
    mean = Smoothed()
    assert mean.value is None
    mean.add(10.0)
    assert mean.value == 10.0
    for _ in range(50):
        mean.add(1.0)
    assert mean.value == pytest.approx(1.0, abs=0.01)
    assert 0 < PATIENCE < 1
