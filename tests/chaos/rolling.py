"""Services that are restarted and scaled by the command, one after another, under load."""

from __future__ import annotations

import asyncio

from tests.chaos.load import Rate
from tests.chaos.mesh import Layout
from tests.chaos.report import Outcome, Target
from tests.chaos.samples import AGNEWS
from tests.chaos.trial import Trial
from tests.chaos.wanted import Wanted

REQUESTS = 20_000
SCALED = "expert-3"


async def rolling(wanted: Wanted) -> Outcome:
    """Every service restarted, again and again until enough was asked, and an expert scaled from 1 to 4 and back."""
    rounds = [0]

    async def roll(trial: Trial) -> None:
        least = wanted.seconds * trial.rate.per_s if wanted.seconds else REQUESTS
        while rounds[0] < 1 or trial.load.sent < least:
            for service in dict.fromkeys(one.service for one in trial.mesh.services().values()):
                with trial.injector.marked("restart", service):
                    await trial.mesh.command("restart", service)
            for count in (4, 1):
                with trial.injector.marked(f"scale to {count}", SCALED):
                    await trial.mesh.command("scale", f"{SCALED}={count}")
                await asyncio.sleep(1.0)
            rounds[0] += 1

    async with Trial(Layout(AGNEWS, {"gateway": 2}), Rate(wanted.per_s or 40.0, by_client=True)) as trial:
        run = await trial.run(roll)
    sent = run.evidence.sent
    targets = [
        Target("0 failed", f"{run.failed} of {sent}", not run.failed),
        Target(f"at least {REQUESTS:,} requests", f"{sent:,}", sent >= REQUESTS),
        Target("every service was restarted", f"{rounds[0]} times", rounds[0] >= 1),
    ]
    return Outcome("rolling", {"restarts and scaling": run}, targets)
