"""Runs scenarios: `python -m tests.chaos replicas stops`; the exit status says whether all that was promised holds."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path

from rich.console import Console

from tests.chaos.mixture import mixed
from tests.chaos.overload import overload
from tests.chaos.report import Outcome, machine, show, write
from tests.chaos.rolling import rolling
from tests.chaos.scenarios import corrupt, lost_expert, lost_gateway, replicas, stops
from tests.chaos.wanted import Wanted

SCENARIOS = {
    "replicas": replicas,
    "stops": stops,
    "lost-expert": lost_expert,
    "rolling": rolling,
    "lost-gateway": lost_gateway,
    "corrupt": corrupt,
    "overload": overload,
    "mixed": mixed,
}


def main() -> int:
    """Runs what was asked for; 0 if every target is met and every invariant holds."""
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", allow_abbrev=False)
    told = "; ".join(f"{name}: {(scenario.__doc__ or '').strip()}" for name, scenario in SCENARIOS.items())
    parser.add_argument("scenarios", nargs="*", choices=[*SCENARIOS, []], metavar="SCENARIO", help=told)
    parser.add_argument(
        "--seconds", type=float, default=0.0, help="how long faults go on (default: the scenario's own)"
    )
    parser.add_argument("--per-s", type=float, default=0.0, help="requests a second (default: the scenario's own)")
    parser.add_argument("--seed", type=int, default=0, help="of faults that are drawn")
    parser.add_argument("--out", type=Path, help="folder for chaos.json, timelines and failed requests")
    asked = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 180, highlight=False)
    console.print(machine())
    outcomes: list[Outcome] = []
    for name in asked.scenarios or ["mixed"]:
        outcome = asyncio.run(SCENARIOS[name](Wanted(asked.seconds, asked.per_s, asked.seed)))
        show(outcome, console)
        outcomes.append(outcome)
        if asked.out:
            write(outcomes, asked.out)
    return 0 if all(outcome.holds for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
