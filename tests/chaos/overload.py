"""Ten times as much as can be served, on devices whose time is simulated, so that refusing is not what cores do."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from expertmesh.v1.inference_pb2 import ClassifyRequest
from tests.chaos.load import Rate
from tests.chaos.mesh import Layout
from tests.chaos.record import Record
from tests.chaos.report import Outcome, Target, quantile_s
from tests.chaos.samples import AGNEWS, TINYTEXT, Samples, classifications, generations
from tests.chaos.trial import Run, Trial
from tests.chaos.wanted import Wanted

SIMULATED = {"gating": "1+1000", "expert": "1"}
TIMES = 10.0
LEAST_GOODPUT = 0.9  # of the peak
MOST_LATE = 0.05  # of those that are answered, in their number
LEAST_SHARE = 0.25  # of what is large that is answered, by that of what is small
LEAST_STEADY_PER_S = 2.0  # so that there is enough to judge by afterwards
GROWTH_BYTES = 64 * 2**20
LEAD_S = 10.0  # after which queues are full, and memory is what it will be


@dataclass(frozen=True)
class Flood:
    """What is asked too much of.

    Attributes:
        model: Which.
        samples: What to ask.
        timeout_s: How long callers wait.
        steps_per_s: Rates at which the peak is looked for.
        probe_s: How long each is tried.
    """

    model: Path
    samples: Samples
    timeout_s: float
    steps_per_s: Sequence[float]
    probe_s: float

    def size(self, record: Record) -> int:
        """Of what was asked: characters, or most tokens."""
        request = self.samples.requests[record.sample]
        return sum(map(len, request.texts)) if isinstance(request, ClassifyRequest) else request.max_tokens


def _floods() -> dict[str, Flood]:
    short, long = generations(16, 8).requests, generations(16, 32).requests
    sequences = Samples("generate", (*short, *long), len(short) + len(long))
    return {
        "classify": Flood(AGNEWS, classifications(), 2.0, (4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0), 8.0),
        "generate": Flood(TINYTEXT, sequences, 4.0, (2.0, 4.0, 6.0, 8.0, 12.0, 16.0, 24.0), 12.0),
    }


async def overload(wanted: Wanted) -> Outcome:
    """Finds the peak, asks for ten times that, and looks at what was admitted."""
    runs: dict[str, Run] = {}
    targets: list[Target] = []
    for name, flood in _floods().items():
        runs[f"{name}, {TIMES:.0f} times"], found = await _drowned(name, flood, wanted.seconds or 60.0)
        targets += found
    return Outcome("overload", runs, targets)


async def _drowned(name: str, flood: Flood, seconds: float) -> tuple[Run, list[Target]]:
    layout = Layout(flood.model, simulate=SIMULATED, expert_services=2)
    records: list[Record] = []
    span_s = [0.0, 0.0]
    async with Trial(layout, Rate(flood.steps_per_s[0], flood.timeout_s), flood.samples) as trial:
        peak_per_s = await _peak(trial, flood)

        async def drown(trial: Trial) -> None:
            clock = asyncio.get_running_loop().time
            async with trial.another_load(Rate(TIMES * peak_per_s, flood.timeout_s)) as load:
                span_s[0] = clock()
                await asyncio.sleep(seconds)
                span_s[1] = clock()
            records.extend(load.records)

        run = await trial.run(drown, Rate(max(LEAST_STEADY_PER_S, 0.3 * peak_per_s), flood.timeout_s))
    ok = [record for record in run.records if record.is_ok and span_s[0] <= record.end_s < span_s[1]]
    ok_per_s = len(ok) / (span_s[1] - span_s[0])
    late = sum(record.code == "DEADLINE_EXCEEDED" for record in records)
    small, large = _shares(records, flood)
    return run, [
        Target(
            f"{name}: at {TIMES:.0f} times the load at least {LEAST_GOODPUT:.0%} of the peak of {peak_per_s:.1f}/s",
            f"{ok_per_s:.1f}/s",
            ok_per_s >= LEAST_GOODPUT * peak_per_s,
        ),
        Target(
            f"{name}: what is admitted is answered within its deadline",
            f"{late} late beside {len(ok)} in time; p99 of these {quantile_s(ok, 0.99):.2f} of {flood.timeout_s:.0f} s",
            late <= MOST_LATE * len(ok),
        ),
        Target(
            f"{name}: what is large has its share",
            f"{large:.1%} of what is larger than the mean answered, {small:.1%} of what is smaller",
            large >= LEAST_SHARE * small > 0,
        ),
        Target(f"{name}: memory is flat", *_flat(run, span_s)),
    ]


async def _peak(trial: Trial, flood: Flood) -> float:
    """The most that is answered in a second at any rate."""
    best = 0.0
    for per_s in flood.steps_per_s:
        async with trial.another_load(Rate(per_s, flood.timeout_s)) as load:
            await asyncio.sleep(flood.probe_s)
            ok_per_s = sum(record.is_ok for record in load.records) / flood.probe_s
        best = max(best, ok_per_s)
        if ok_per_s < 0.7 * per_s:
            break
    return best


def _shares(records: Sequence[Record], flood: Flood) -> tuple[float, float]:
    """Of what was asked that is smaller, or larger, than the mean, the share that was answered."""
    mean_size = fmean(map(flood.size, records))
    asked = Counter(flood.size(record) > mean_size for record in records)
    answered = Counter(flood.size(record) > mean_size for record in records if record.is_ok)
    return answered[False] / asked[False], answered[True] / asked[True]


def _flat(run: Run, span_s: list[float]) -> tuple[str, bool]:
    """Growth of all memory between the time when queues are full and the end."""
    during = [size for at_s, size in run.memory if span_s[0] + LEAD_S <= at_s <= span_s[1]]
    grown = during[-1] - during[0] if len(during) > 1 else GROWTH_BYTES + 1
    return f"{grown / 2**20:+.1f} MiB", grown <= GROWTH_BYTES
