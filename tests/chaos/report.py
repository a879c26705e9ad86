"""What a run tells: tables for people on a terminal and in Markdown, JSON for programs."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from tests.chaos.record import Record
from tests.chaos.timeline import timeline
from tests.chaos.trial import Run

SHOWN = 3


@dataclass(frozen=True)
class Target:
    """A figure that a scenario promises.

    Attributes:
        name: What is measured, and what it must be.
        seen: What was.
        met: Whether that is enough.
    """

    name: str
    seen: str
    met: bool


@dataclass(frozen=True)
class Outcome:
    """What a scenario has given.

    Attributes:
        scenario: Its name.
        runs: By what they were.
        targets: Its own.
    """

    scenario: str
    runs: Mapping[str, Run]
    targets: Sequence[Target]

    @property
    def holds(self) -> bool:
        """Whether every target is met and every invariant of every run holds."""
        found = [finding for run in self.runs.values() for finding in run.findings]
        return all(target.met for target in self.targets) and all(finding.holds for finding in found)


def show(outcome: Outcome, console: Console) -> None:
    """Prints an outcome."""
    console.rule(outcome.scenario)
    requests = Table("run", "sent", "OK", "failed", "OK/s", "p50 ms", "p99 ms", "routes", "faults", title="requests")
    for name, run in outcome.runs.items():
        ok = [record for record in run.records if record.is_ok]
        routes = Counter("+".join(record.routes) for record in ok)
        requests.add_row(
            name,
            str(run.evidence.sent),
            str(len(ok)),
            str(run.failed),
            f"{run.ok_per_s:.1f}",
            f"{quantile_s(ok, 0.5) * 1e3:.0f}",
            f"{quantile_s(ok, 0.99) * 1e3:.0f}",
            ", ".join(f"{route} {count}" for route, count in routes.most_common()),
            ", ".join(f"{count} {what}" for what, count in Counter(mark.what for mark in run.marks).items()),
        )
    console.print(requests)
    judged = Table("run", "invariant", "", "seen", title="invariants")
    for name, run in outcome.runs.items():
        for finding in run.findings:
            told = [finding.figure, *finding.breaches[:SHOWN]]
            if len(finding.breaches) > SHOWN:
                told.append(f"and {len(finding.breaches) - SHOWN} more")
            judged.add_row(name, finding.name, _verdict(finding.holds, "holds", "BROKEN"), "\n".join(told))
    console.print(judged)
    if outcome.targets:
        targets = Table("target", "", "seen", title="targets")
        for target in outcome.targets:
            targets.add_row(target.name, _verdict(target.met, "met", "NOT MET"), target.seen)
        console.print(targets)


def write(outcomes: Sequence[Outcome], folder: Path) -> None:
    """Writes `chaos.json`, `report.md`, and a picture and the failed requests of every run, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text("\n".join(_markdown(outcomes)))
    plain = {"machine": machine(), "scenarios": [_plain(outcome) for outcome in outcomes]}
    (folder / "chaos.json").write_text(json.dumps(plain, indent=1))
    for outcome in outcomes:
        for name, run in outcome.runs.items():
            stem = _stem(outcome, name)
            (folder / f"{stem}.svg").write_text(timeline(run, f"{outcome.scenario}: {name}"))
            failed = [record for record in run.records if not record.is_ok]
            lines = [json.dumps({**asdict(record), "answer": len(record.answer)}) for record in failed]
            (folder / f"{stem}-failed.jsonl").write_text("\n".join(lines))


def _stem(outcome: Outcome, name: str) -> str:
    return f"{outcome.scenario}-{name}".replace(",", "").replace(" ", "-")


def _markdown(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """The lines of `report.md`."""
    yield f"# Chaos\n\n{date.today():%d %B %Y}, {machine()}.\n"
    for outcome in outcomes:
        yield f"## {outcome.scenario}: {'holds' if outcome.holds else 'does not hold'}\n"
        if outcome.targets:
            yield "| target | | seen |\n|---|---|---|"
            yield from (
                f"| {one.name} | {'met' if one.met else '**not met**'} | {one.seen} |" for one in outcome.targets
            )
            yield ""
        for name, run in outcome.runs.items():
            seconds = run.ended_s - run.started_s
            faults = ", ".join(f"{count} {what}" for what, count in Counter(mark.what for mark in run.marks).items())
            yield f"### {name}\n\n{run.evidence.sent:,} requests in {seconds:.0f} s, {run.failed} failed."
            yield f"Faults: {faults or 'none'}.\n\n![timeline]({_stem(outcome, name)}.svg)\n"
            yield "| invariant | | seen |\n|---|---|---|"
            for one in run.findings:
                seen = "; ".join([one.figure, *one.breaches[:SHOWN]])
                yield f"| {one.name} | {'holds' if one.holds else '**broken**'} | {seen} |"
            yield ""


def machine() -> str:
    """What it was measured on."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{os.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.system()}, Python {platform.python_version()}"


def quantile_s(records: Sequence[Record], share: float) -> float:
    """So many of the requests took no longer than this, in seconds."""
    took_s = sorted(record.took_s for record in records)
    if len(took_s) < 2:
        return took_s[0] if took_s else 0.0
    return statistics.quantiles(took_s, n=100, method="inclusive")[min(98, round(share * 100) - 1)]


def _plain(outcome: Outcome) -> dict[str, Any]:
    return {
        "scenario": outcome.scenario,
        "holds": outcome.holds,
        "targets": [asdict(target) for target in outcome.targets],
        "runs": {name: _plain_run(run) for name, run in outcome.runs.items()},
    }


def _plain_run(run: Run) -> dict[str, Any]:
    ok = [record for record in run.records if record.is_ok]
    return {
        "seconds": run.ended_s - run.started_s,
        "sent": run.evidence.sent,
        "ended": dict(Counter(record.code for record in run.records)),
        "routes": dict(Counter("+".join(record.routes) for record in ok)),
        "ok_per_s": run.ok_per_s,
        "p50_s": quantile_s(ok, 0.5),
        "p99_s": quantile_s(ok, 0.99),
        "longest_stall_s": max((record.stall_s for record in ok), default=0.0),
        "expert_calls": dict(run.evidence.calls),
        "replica_events": dict(run.counted),
        "faults": [
            {**asdict(mark), "start_s": mark.start_s - run.started_s, "end_s": mark.end_s - run.started_s}
            for mark in run.marks
        ],
        "healed_s": run.evidence.healed_s - run.started_s,
        "invariants": [
            {"name": one.name, "holds": one.holds, "seen": one.figure, "breaches": list(one.breaches[:20])}
            for one in run.findings
        ],
    }


def _verdict(holds: bool, yes: str, no: str) -> str:
    return f"[green]{yes}[/green]" if holds else f"[bold red]{no}[/bold red]"
