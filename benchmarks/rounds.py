"""Rounds in turn: a machine that slows down slows down every contender."""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import TypeVar

T = TypeVar("T")
Figures = dict[str, list[float]]  # of each contender, one for each round


async def in_turn(contenders: Mapping[str, Callable[[], Awaitable[T]]], rounds: int) -> dict[str, list[T]]:
    """Asks every contender once a round for its figure; each round begins with another one.

    Args:
        contenders: What to run, by name; a first figure of each warms it up and is thrown away.
        rounds: How many.
    """
    names = list(contenders)
    figures: dict[str, list[T]] = {name: [] for name in names}
    for name in names:
        await contenders[name]()
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            figures[name].append(await contenders[name]())
    return figures


async def median_ms(call: Callable[[], Awaitable[object]], seconds: float, least_calls: int = 5) -> float:
    """Median milliseconds of a call that is made again and again."""
    took_ms: list[float] = []
    started_s = time.perf_counter()
    while len(took_ms) < least_calls or time.perf_counter() - started_s < seconds:
        sent_s = time.perf_counter()
        await call()
        took_ms.append((time.perf_counter() - sent_s) * 1e3)
    return statistics.median(took_ms)


def median_ms_of(call: Callable[[], object], seconds: float, least_calls: int = 5) -> float:
    """The same of a call that blocks."""
    took_ms: list[float] = []
    started_s = time.perf_counter()
    while len(took_ms) < least_calls or time.perf_counter() - started_s < seconds:
        sent_s = time.perf_counter()
        call()
        took_ms.append((time.perf_counter() - sent_s) * 1e3)
    return statistics.median(took_ms)


def faster(figures: Figures, first: str, *others: str) -> str:
    """The contender with the least median."""
    return min((first, *others), key=lambda name: statistics.median(figures[name]))
