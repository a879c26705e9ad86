"""Which trials there are: each breaks a mesh in one way and has targets of its own beside the invariants."""

from __future__ import annotations

import asyncio

from tests.chaos.load import Rate
from tests.chaos.mesh import Layout
from tests.chaos.samples import AGNEWS
from tests.chaos.trial import Trial


async def probe() -> None:
    async def kills(trial: Trial) -> None:
        await asyncio.sleep(2)
        await trial.injector.kill("expert-3.0")
        await asyncio.sleep(3)

    layout = Layout(AGNEWS, {"expert-3": 2}, proxies=["expert-3.0"])
    async with Trial(layout, Rate(20.0)) as trial:
        run = await trial.run(kills)
    for f in run.findings:
        print(f.holds, f.name, f.figure, f.breaches[:5])
    print(run.counted, run.failed, run.ok_per_s, run.marks)


if __name__ == "__main__":
    asyncio.run(probe())
