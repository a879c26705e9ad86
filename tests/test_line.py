from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.serving.line import Line
from expertmesh.serving.pass_times import PassTimes
from expertmesh.serving.shedding import Quantile

sizes = st.lists(st.integers(1, 10_000), min_size=2, max_size=40)
seconds = st.floats(1e-4, 10)


@settings(deadline=None, database=None)
@given(sizes, seconds, st.floats(0, 1))
def test_a_line_is_found_again(measured: list[int], always_s: float, unit_s: float) -> None:
    line = Line()
    for size in measured:
        line.add(size, always_s + unit_s * size)
    if line.is_spread:
        assert line.unit_s == pytest.approx(unit_s, rel=1e-3, abs=1e-6)
        assert line.at(3 * max(measured)) == pytest.approx(always_s + 3 * unit_s * max(measured), rel=1e-3, abs=1e-2)
    assert line.at(line.mean_size) == pytest.approx(line.mean_s)


@settings(deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(1, 10_000), seconds), min_size=1, max_size=40))
def test_no_part_of_a_line_is_below_zero(points: list[tuple[int, float]]) -> None:
    line = Line()
    assert not line.is_known
    for size, taken_s in points:
        line.add(size, taken_s)
    assert line.is_known
    assert line.unit_s >= 0
    assert line.always_s >= -1e-9


def test_equal_sizes_tell_nothing_of_what_size_adds() -> None:
    line = Line()
    for size, taken_s in ((100, 1.0), (101, 2.0), (100, 1.5)):
        line.add(size, taken_s)
    assert not line.is_spread
    assert line.unit_s == 0
    assert line.at(1) == line.at(1000) == line.mean_s


def test_a_line_follows_what_is_measured() -> None:
    line, slow = Line(), Line(0.99)
    for unit_s in (0.1, 0.2):
        for number in range(100):
            line.add(1 + number % 10, unit_s * (1 + number % 10))
            slow.add(1 + number % 10, unit_s * (1 + number % 10))
    assert line.unit_s == pytest.approx(0.2, rel=0.01)
    assert 0.12 < slow.unit_s < 0.19


def test_a_level_that_was_not_seen_is_guessed_until_it_is() -> None:
    times = PassTimes()
    assert not times.at(2).are_known
    for size in (10, 20, 30):
        times.at(1).add(size, 0.1 + 0.01 * size)
    assert times.at(1).of(40) == pytest.approx(0.5)
    assert times.at(4).of(40) == pytest.approx(2.0)
    for size in 6 * (10, 20, 30):
        times.at(4).add(size, 0.15 + 0.01 * size)
    assert times.at(4).of(40) == pytest.approx(0.55, rel=0.1)  # the guess weighs little
    assert times.at(1).of(40) == pytest.approx(0.5)
    assert times.at(2).of(40) == pytest.approx(1.0)  # guessed from level 1, which was asked for last


def test_a_quantile_is_what_most_are_not_above() -> None:
    dice, quantile = random.Random(0), Quantile(0.9)
    assert quantile.value is None
    for _ in range(2000):
        quantile.add(dice.uniform(0, 100))
    assert quantile.value is not None
    assert 80 < quantile.value < 98
    for _ in range(500):
        quantile.add(1.0)
    assert quantile.value < 10
