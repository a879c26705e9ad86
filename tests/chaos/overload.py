"""Ten times as much as can be served, on devices whose time is simulated, so that refusing is not what cores do."""

from __future__ import annotations

import asyncio

from tests.chaos.load import Rate
from tests.chaos.mesh import Layout
from tests.chaos.record import Record
from tests.chaos.report import Outcome, Target, quantile_s
from tests.chaos.samples import AGNEWS
from tests.chaos.trial import Run, Trial
from tests.chaos.wanted import Wanted

SIMULATED = {"gating": "1+1000", "expert": "1"}
TIMEOUT_S = 2.0
TIMES = 10.0
PROBE_S = 8.0
STEPS_PER_S = (4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0)
GROWTH_BYTES = 64 * 2**20
LEAD_S = 10.0  # after which queues are full, and memory is what it will be


async def overload(wanted: Wanted) -> Outcome:
    """Finds the peak, asks for ten times that, and looks at what was admitted."""
    seconds = wanted.seconds or 60.0
    layout = Layout(AGNEWS, simulate=SIMULATED, expert_services=2)
    flood: list[Record] = []
    span_s = [0.0, 0.0]
    async with Trial(layout, Rate(4.0, TIMEOUT_S)) as trial:
        peak_per_s, at_peak = await _peak(trial)

        async def drown(trial: Trial) -> None:
            clock = asyncio.get_running_loop().time
            async with trial.another_load(Rate(TIMES * peak_per_s, TIMEOUT_S)) as load:
                span_s[0] = clock()
                await asyncio.sleep(seconds)
                span_s[1] = clock()
            flood.extend(load.records)

        run = await trial.run(drown, Rate(0.3 * peak_per_s, TIMEOUT_S))
    ok = [record for record in run.records if record.is_ok and span_s[0] <= record.end_s < span_s[1]]
    ok_per_s = len(ok) / (span_s[1] - span_s[0])
    slow_s, calm_s = quantile_s(ok, 0.99), quantile_s(at_peak, 0.99)
    targets = [
        Target(
            f"goodput at {TIMES:.0f} times the load at least 90 % of the peak of {peak_per_s:.1f}/s",
            f"{ok_per_s:.1f}/s",
            ok_per_s >= 0.9 * peak_per_s,
        ),
        Target(
            "what is admitted is answered within its deadline",
            f"p99 {slow_s:.2f} s; {calm_s:.2f} s at the peak",
            bool(ok) and slow_s <= TIMEOUT_S,
        ),
        Target("memory is flat", *_flat(run, span_s)),
    ]
    return Outcome("overload", {f"{TIMES:.0f} times": run}, targets)


async def _peak(trial: Trial) -> tuple[float, list[Record]]:
    """The most that is answered in a second at any rate, and the answers at that rate."""
    best, answers = 0.0, []
    for per_s in STEPS_PER_S:
        async with trial.another_load(Rate(per_s, TIMEOUT_S)) as load:
            await asyncio.sleep(PROBE_S)
            ok = [record for record in load.records if record.is_ok]
        if len(ok) / PROBE_S > best:
            best, answers = len(ok) / PROBE_S, ok
        if len(ok) / PROBE_S < 0.7 * per_s:
            break
    return best, answers


def _flat(run: Run, span_s: list[float]) -> tuple[str, bool]:
    """Growth of all memory between the time when queues are full and the end."""
    during = [size for at_s, size in run.memory if span_s[0] + LEAD_S <= at_s <= span_s[1]]
    grown = during[-1] - during[0] if len(during) > 1 else GROWTH_BYTES + 1
    return f"{grown / 2**20:+.1f} MiB", grown <= GROWTH_BYTES
