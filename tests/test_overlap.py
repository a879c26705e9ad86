from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.serving.overlap import BETTER, MOST_LEVEL, Overlap

Duration = Callable[[int, int], float]  # (rows of a piece, pieces under way) -> seconds
SETTLED_S = 60.0


class World:
    """Pieces of work whose durations are known, on a clock of its own."""

    def __init__(self, duration: Duration, fixed: int = 0, noise: float = 0.0, seed: int = 0) -> None:
        self.now_s = 0.0
        self.overlap = Overlap(fixed, lambda: self.now_s)
        self.levels: list[tuple[float, int]] = []  # (seconds, level)
        self._duration = duration
        self._noise = noise
        self._random = random.Random(seed)

    def run(self, load: int, seconds: float) -> float:
        """Does nothing but such work for so long; gives rows per second."""
        ends: list[tuple[float, object, int]] = []
        stop_s, rows, started_s = self.now_s + seconds, 0, self.now_s
        while self.now_s < stop_s:
            level = self.overlap.level(load, load)
            self.levels.append((self.now_s, level))
            while len(ends) < level:
                piece = -(-load // level)
                took_s = self._duration(piece, level) * (1 + self._noise * self._random.random())
                ends.append((self.now_s + took_s, self.overlap.started(load, load), piece))
            ends.sort(key=lambda one: one[0])
            end_s, started, piece = ends.pop(0)
            self.now_s = max(self.now_s, end_s)
            self.overlap.ended(started, piece)  # type: ignore[arg-type]
            rows += piece
        for _, started, _ in ends:
            self.overlap.ended(started, 0)  # type: ignore[arg-type]
        return rows / (self.now_s - started_s)


def shared(rows: int, level: int) -> float:
    """On cores that all share, two halves cost a fixed part twice, and run at half the speed each."""
    return level * (0.010 + 0.0002 * rows)


def own(devices: int) -> Duration:
    """Stages on devices of their own, so many of each."""
    return lambda rows, level: max(1.0, level / (2 * devices)) * (0.002 + 0.0005 * rows)


def most_used(world: World, since_s: float) -> int:
    used = [level for at_s, level in world.levels if at_s >= since_s]
    return max(set(used), key=used.count)


@pytest.mark.parametrize(("duration", "best"), [(shared, 1), (own(1), 2), (own(2), 4), (own(4), 8), (own(8), 8)])
@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_it_finds_what_is_best(duration: Duration, best: int, noise: float) -> None:
    world = World(duration, noise=noise)
    world.run(32, SETTLED_S)
    assert most_used(world, SETTLED_S / 2) == best


def test_it_has_found_two_after_two_seconds_of_steps() -> None:
    world = World(own(1))
    world.run(32, 4.0)
    assert most_used(world, 2.0) == 2


@settings(max_examples=10, deadline=None)
@given(
    fixed_s=st.floats(0.01, 0.05),
    row_s=st.floats(0, 0.001),
    devices=st.integers(1, 4),
    share=st.floats(0, 1),
    load=st.integers(1, 128),
    seed=st.integers(0, 10),
)
def test_it_costs_little_whatever_is_best(
    fixed_s: float, row_s: float, devices: int, share: float, load: int, seed: int
) -> None:
    def duration(rows: int, level: int) -> float:
        crowd = (1 - share) * level + share * max(1.0, level / (2 * devices))
        return crowd * (fixed_s + row_s * rows)

    levels = [level for level in (1, 2, 4, 8) if level <= load]
    rates = [World(duration, fixed=level).run(load, 5.0) for level in levels]
    first_peak = next((less for less, more in itertools.pairwise(rates) if more < less * BETTER), rates[-1])
    world = World(duration, noise=0.1, seed=seed)
    world.run(load, SETTLED_S)
    # What it may cost: noise, what two levels differ by and are taken as equal, and the trials.
    assert world.run(load, SETTLED_S) >= first_peak / (1.05 * BETTER * 1.07)


def test_what_changes_is_noticed() -> None:
    speed = own(1)
    world = World(lambda rows, level: speed(rows, level))
    world.run(32, SETTLED_S)
    speed = shared
    world.run(32, 2 * SETTLED_S)
    assert most_used(world, 2 * SETTLED_S) == 1
    speed = own(1)
    world.run(32, 2 * SETTLED_S)
    assert most_used(world, 4 * SETTLED_S) == 2


def test_loads_are_told_apart() -> None:
    def duration(rows: int, level: int) -> float:
        return shared(rows, level) if rows * level < 16 else own(1)(rows, level)

    world = World(duration)
    for _ in range(40):
        world.run(4, 3.0)
        world.run(32, 3.0)
    world.levels.clear()
    before_s = world.now_s
    world.run(4, 10.0)
    assert most_used(world, before_s) == 1
    before_s = world.now_s
    world.run(32, 10.0)
    assert most_used(world, before_s) == 2


@given(fixed=st.integers(0, 9), load=st.integers(1, 300), most=st.integers(1, 300))
def test_there_are_never_more_than_can_be(fixed: int, load: int, most: int) -> None:
    level = Overlap(fixed).level(load, most)
    assert 1 <= level <= min(most, fixed or MOST_LEVEL)


def test_one_that_is_fixed_is_so_at_once_and_stays() -> None:
    world = World(shared, fixed=2)
    world.run(32, 10.0)
    assert {level for _, level in world.levels} == {2}


def test_what_failed_counts_for_nothing() -> None:
    world = World(own(1))
    for _ in range(1000):
        started = world.overlap.started(32, 32)
        world.now_s += 0.001
        world.overlap.ended(started, 0)
    assert world.overlap.level(32, 32) == 1
    world.run(32, SETTLED_S)
    assert most_used(world, SETTLED_S * 1.5 / 2) == 2


def test_a_single_piece_is_never_divided() -> None:
    assert Overlap(4).level(1, 1) == 1
    assert Overlap().level(256, 1) == 1
