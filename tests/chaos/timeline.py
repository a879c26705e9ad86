"""A picture of a run: what was answered each second and by which route, how long it took, and what was broken when."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from html import escape
from statistics import median

from tests.chaos.record import Record
from tests.chaos.trial import Run

WIDTH, LEFT, RIGHT = 1000, 100, 20
COUNTS_TOP, COUNTS_HEIGHT = 60, 180
TIMES_TOP, TIMES_HEIGHT = 290, 120
MARKS_TOP, MARK_HEIGHT = 450, 16
FONT = 'font-family="sans-serif" font-size="11"'
COLOURS = {
    "MESH": "#4c9f70",
    "FULL_MODEL": "#4878a8",
    "DEGRADED": "#d9a441",
    "UNAVAILABLE": "#c8553d",
    "RESOURCE_EXHAUSTED": "#8a5a83",
    "DEADLINE_EXCEEDED": "#6b3f2a",
    "other": "#000000",
}


def timeline(run: Run, title: str) -> str:
    """The picture as SVG."""
    seconds = max(1, math.ceil(max([record.end_s for record in run.records] + [run.ended_s]) - run.started_s))
    step = (WIDTH - LEFT - RIGHT) / seconds
    kinds = sorted({mark.what for mark in run.marks})
    height = MARKS_TOP + MARK_HEIGHT * (len(kinds) + 2)

    def x(at_s: float) -> float:
        return LEFT + step * min(max(at_s - run.started_s, 0.0), seconds)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" {FONT}>',
        f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>',
        f'<text x="{LEFT}" y="20" font-size="14">{escape(title)}</text>',
        *_legend(run.records),
        *_counts(run, step),
        *_times(run, step),
        *_seconds(step, seconds, height),
    ]
    for row, kind in enumerate(kinds):
        y = MARKS_TOP + MARK_HEIGHT * row
        parts.append(f'<text x="{LEFT - 4}" y="{y + 10}" text-anchor="end" font-size="9">{escape(kind)}</text>')
        for mark in (mark for mark in run.marks if mark.what == kind):
            width = max(2.0, x(mark.end_s) - x(mark.start_s))
            parts.append(
                f'<rect x="{x(mark.start_s):.1f}" y="{y}" width="{width:.1f}" height="{MARK_HEIGHT - 4}" fill="#333">'
                f"<title>{escape(f'{kind} {mark.target}')}</title></rect>"
            )
    healed = x(run.evidence.healed_s)
    parts.append(
        f'<line x1="{healed:.1f}" y1="{COUNTS_TOP}" x2="{healed:.1f}" y2="{height - MARK_HEIGHT * 2}" stroke="#4c9f70" '
        f'stroke-dasharray="4 3"/><text x="{healed + 3:.1f}" y="{COUNTS_TOP + 10}" fill="#4c9f70">healed</text>'
    )
    return "\n".join([*parts, "</svg>"])


def outcome_of(record: Record) -> str:
    """Under what a request is counted: its route, or its failure."""
    if not record.is_ok:
        return record.code if record.code in COLOURS else "other"
    return next((route for route in ("DEGRADED", "FULL_MODEL") if route in record.routes), "MESH")


def _legend(records: Sequence[Record]) -> list[str]:
    counts = Counter(map(outcome_of, records))
    parts, at = [], LEFT
    for name, colour in COLOURS.items():
        if counts[name]:
            text = f"{name} {counts[name]}"
            parts.append(f'<rect x="{at}" y="30" width="10" height="10" fill="{colour}"/>')
            parts.append(f'<text x="{at + 14}" y="39">{text}</text>')
            at += 34 + 7 * len(text)
    return parts


def _counts(run: Run, step: float) -> list[str]:
    second2counts: dict[int, Counter[str]] = defaultdict(Counter)
    for record in run.records:
        second2counts[int(record.end_s - run.started_s)][outcome_of(record)] += 1
    most = max((sum(counts.values()) for counts in second2counts.values()), default=1)
    parts = _axis(COUNTS_TOP, COUNTS_HEIGHT, "requests a second", str(most))
    for second, counts in second2counts.items():
        base = float(COUNTS_TOP + COUNTS_HEIGHT)
        for name, colour in COLOURS.items():
            high = COUNTS_HEIGHT * counts[name] / most
            base -= high
            if high:
                parts.append(
                    f'<rect x="{LEFT + step * second:.1f}" y="{base:.1f}" width="{max(1.0, step - 0.5):.1f}" '
                    f'height="{high:.1f}" fill="{colour}"/>'
                )
    return parts


def _times(run: Run, step: float) -> list[str]:
    """Median and longest time of what was sent in each second, on a logarithmic scale."""
    second2took: dict[int, list[float]] = defaultdict(list)
    for record in run.records:
        if record.is_ok:
            second2took[int(record.start_s - run.started_s)].append(record.took_s)
    low, high = math.log10(0.005), math.log10(30.0)

    def y(took_s: float) -> float:
        share = (math.log10(min(max(took_s, 0.005), 30.0)) - low) / (high - low)
        return TIMES_TOP + TIMES_HEIGHT * (1 - share)

    parts = _axis(TIMES_TOP, TIMES_HEIGHT, "seconds to the answer: median and longest", "30")
    for grid in (0.01, 0.1, 1.0, 10.0):
        parts.append(
            f'<line x1="{LEFT}" y1="{y(grid):.1f}" x2="{WIDTH - RIGHT}" y2="{y(grid):.1f}" stroke="#dddddd"/>'
            f'<text x="{LEFT - 4}" y="{y(grid) + 4:.1f}" text-anchor="end">{grid:g}</text>'
        )
    for of, colour in ((median, "#4c9f70"), (max, "#c8553d")):
        points = [f"{LEFT + step * (s + 0.5):.1f},{y(of(took)):.1f}" for s, took in sorted(second2took.items())]  # type: ignore[operator]
        parts.append(f'<polyline points="{" ".join(points)}" fill="none" stroke="{colour}"/>')
    return parts


def _axis(top: int, height: int, name: str, most: str) -> list[str]:
    return [
        f'<text x="{LEFT}" y="{top - 5}">{escape(name)}</text>',
        f'<text x="{LEFT - 4}" y="{top + 8}" text-anchor="end">{most}</text>',
        f'<line x1="{LEFT}" y1="{top + height}" x2="{WIDTH - RIGHT}" y2="{top + height}" stroke="#888888"/>',
    ]


def _seconds(step: float, seconds: int, height: int) -> list[str]:
    every = next(step for step in (5, 10, 30, 60, 120, 300, 600, 10**9) if seconds / step <= 20)
    return [
        f'<text x="{LEFT + step * second:.1f}" y="{height - 8}" text-anchor="middle">{second} s</text>'
        for second in range(0, seconds + 1, every)
    ]
