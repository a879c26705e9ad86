"""What a benchmark found: tables of medians with their spread, targets, the machine; printed, and written as JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

JsonFile = Annotated[Path | None, typer.Option("--json", help="Also write the figures as JSON.")]


@dataclass(frozen=True)
class Target:
    """A comparison of medians with what it shall be.

    Attributes:
        what: What is compared.
        value: Of the medians.
        low: Least of the rounds.
        high: Most of the rounds.
        bound: What the value shall be.
        at_most: Whether it shall be at most that, or at least.
        unit: Of all these; empty for a ratio.
    """

    what: str
    value: float
    low: float
    high: float
    bound: float
    at_most: bool
    unit: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the value is as it shall be."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound


def ratio(
    what: str,
    over: Sequence[float],
    under: Sequence[float],
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> Target:
    """The ratio of two contenders' medians; the spread is of the ratios within each round."""
    ratios = [one / other for one, other in zip(over, under, strict=True)]
    value = statistics.median(over) / statistics.median(under)
    return _target(what, value, ratios, "", at_most, at_least)


def difference(
    what: str,
    over: Sequence[float],
    under: Sequence[float],
    unit: str,
    share: float = 1.0,
    *,
    at_most: float | None = None,
    at_least: float | None = None,
) -> Target:
    """The difference of two contenders' medians times `share`; the spread is of the differences within each round."""
    differences = [(one - other) * share for one, other in zip(over, under, strict=True)]
    value = (statistics.median(over) - statistics.median(under)) * share
    return _target(what, value, differences, unit, at_most, at_least)


def level(
    what: str, figures: Sequence[float], *, at_most: float | None = None, at_least: float | None = None
) -> Target:
    """One contender's median by itself."""
    return _target(what, statistics.median(figures), figures, "", at_most, at_least)


def _target(
    what: str, value: float, rounds: Sequence[float], unit: str, at_most: float | None, at_least: float | None
) -> Target:
    assert (at_most is None) != (at_least is None)
    bound = at_least if at_most is None else at_most
    assert bound is not None
    return Target(what, value, min(rounds), max(rounds), bound, at_most is not None, unit)


@dataclass
class Report:
    """Collects what a benchmark found.

    Attributes:
        name: The benchmark's.
        figures: Everything measured, for JSON.
        tables: For people.
        targets: What was compared.
        notes: What else a reader should know, a line each.
    """

    name: str
    figures: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def publish(self, json_file: Path | None) -> None:
        """Prints all, and writes the figures if a file is given."""
        console = Console(width=None if Console().is_terminal else 120, highlight=False)
        for table in self.tables:
            console.print(table)
        if self.targets:
            console.print(_table_of(self.targets))
        for note in self.notes:
            console.print(note, markup=False)
        console.print(f"{self.name}: {machine()}", markup=False)
        if json_file is not None:
            plain = {
                "benchmark": self.name,
                "machine": machine(),
                "figures": self.figures,
                "targets": [{**asdict(target), "met": target.is_met} for target in self.targets],
                "notes": self.notes,
            }
            json_file.write_text(json.dumps(plain, indent=1))


def _table_of(targets: Sequence[Target]) -> Table:
    table = Table("compared", "medians", "rounds", "target", "met")
    for target in targets:
        sign = "≤" if target.at_most else "≥"
        table.add_row(
            target.what,
            f"{target.value:.2f} {target.unit}".strip(),
            f"{target.low:.2f}-{target.high:.2f}",
            f"{sign} {target.bound:g} {target.unit}".strip(),
            "yes" if target.is_met else "no",
        )
    return table


def spread(figures: Sequence[float]) -> str:
    """Median and spread, for a cell of a table."""
    return f"{_short(statistics.median(figures))} ({_short(min(figures))}-{_short(max(figures))})"


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def machine() -> str:
    """Names this machine as figures should."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return f"{os.cpu_count()} cores of {processor}, {platform.system()}, Python {platform.python_version()}"
