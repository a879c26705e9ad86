"""All faults mixed: two meshes, one that classifies and one that generates, and a fault every few seconds, by seed."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from tests.chaos.load import Rate
from tests.chaos.mesh import Layout
from tests.chaos.proxy import TO_GATEWAY, TO_REPLICA, Fault
from tests.chaos.report import Outcome, Target
from tests.chaos.samples import AGNEWS, TINYTEXT
from tests.chaos.trial import Trial
from tests.chaos.wanted import Wanted

SECONDS = 1800.0
MISBEHAVIOURS = ("NAN_ROWS", "WRONG_DIGEST", "WRONG_SHAPE", "TRUNCATED", "GARBAGE", "OUT_OF_MEMORY", "HANG", "SLOW")
CONTRACTS = (("EXACT", 6), ("MESH_ONLY", 1), ("DEGRADED_OK", 1))
REPLICAS = {"expert": 2, "gating": 2, "gateway": 2}
EVERY_S = (2.0, 6.0)

Act = Callable[[random.Random], Awaitable[None]]


class Mixture:
    """Draws faults for one trial until its time is over.

    Args:
        trial: What is broken.
        drawn: Draws them.
    """

    def __init__(self, trial: Trial, drawn: random.Random) -> None:
        self._trial, self._drawn, self._injector = trial, drawn, trial.injector
        self._acts: list[Act] = [
            self._kill, self._kill, self._terminate, self._stop, self._misbehave, self._misbehave, self._misbehave,
            self._slow_bytes, self._narrow, self._blackhole, self._corrupt, self._reset, self._half_close,
            self._full_disk, self._restart,
        ]  # fmt: skip

    async def run(self, seconds: float) -> None:
        """One fault after another, every one of them at least once if there is time."""
        end_s = time.monotonic() + seconds
        waiting: list[Act] = []
        while time.monotonic() < end_s:
            if not waiting:
                waiting = self._drawn.sample(self._acts, len(self._acts))
            await waiting.pop()(self._drawn)
            await asyncio.sleep(self._drawn.uniform(*EVERY_S))

    def _running(self, kinds: Sequence[str] = ()) -> list[str]:
        return [
            name
            for name, service in self._trial.mesh.services().items()
            if service.pid and (not kinds or service.kind in kinds)
        ]

    async def _on(self, names: Sequence[str], act: Callable[[str], Awaitable[None]]) -> None:
        """Does something to one of some processes that run; one that has died by itself meanwhile needs no more."""
        if names:
            try:
                await act(self._drawn.choice(names))
            except ProcessLookupError:
                return

    async def _kill(self, drawn: random.Random) -> None:
        await self._on(self._running(), self._injector.kill)

    async def _terminate(self, drawn: random.Random) -> None:
        await self._on(self._running(), self._injector.terminate)

    async def _stop(self, drawn: random.Random) -> None:
        await self._on(self._running(), lambda name: self._injector.stop(name, drawn.uniform(0.5, 8.0)))

    async def _misbehave(self, drawn: random.Random) -> None:
        kind = drawn.choice(MISBEHAVIOURS)
        await self._on(
            self._running(("expert",)), lambda name: self._injector.misbehave(name, kind, 3.0, drawn.randrange(50, 800))
        )

    async def _slow_bytes(self, drawn: random.Random) -> None:
        await self._spoil(Fault(latency_s=drawn.uniform(0.01, 0.3)), "latency")

    async def _narrow(self, drawn: random.Random) -> None:
        await self._spoil(Fault(bytes_per_s=drawn.uniform(20_000, 500_000)), "bandwidth")

    async def _blackhole(self, drawn: random.Random) -> None:
        await self._spoil(Fault(swallow=True), "blackhole")

    async def _corrupt(self, drawn: random.Random) -> None:
        directions = drawn.choice(((TO_GATEWAY,), (TO_REPLICA,)))
        fault = Fault(directions, corrupt=drawn.uniform(0.1, 1.0), seed=drawn.randrange(2**31))
        await self._spoil(fault, f"bytes {directions[0]}")

    async def _spoil(self, fault: Fault, what: str) -> None:
        await self._on(self._trial.layout.proxies, lambda name: self._injector.spoil(name, fault, what, 4.0))

    async def _reset(self, drawn: random.Random) -> None:
        await self._on(self._trial.layout.proxies, self._injector.reset)

    async def _half_close(self, drawn: random.Random) -> None:
        direction = drawn.choice((TO_GATEWAY, TO_REPLICA))
        await self._on(self._trial.layout.proxies, lambda name: self._injector.half_close(name, direction))

    async def _full_disk(self, drawn: random.Random) -> None:
        await self._on(self._running(("expert", "gating")), lambda name: self._injector.fill_disk(name, 3.0))

    async def _restart(self, drawn: random.Random) -> None:
        """A rolling restart by the command; services with proxies are left where these expect them."""
        behind = {name.rpartition(".")[0] for name in self._trial.layout.proxies}
        services = {one.service for one in self._trial.mesh.services().values()} - behind
        service = drawn.choice(sorted(services))
        with self._injector.marked("restart", service) as mark:
            try:
                await self._trial.mesh.command("restart", service)
            except RuntimeError:  # a process that is dead just now cannot be restarted: that is told and harms nothing
                mark.hits = 0


async def mixed(wanted: Wanted) -> Outcome:
    """Both meshes at once, each with a mixture of its own."""
    seconds = wanted.seconds or SECONDS

    def trial_of(model: Path, per_s: float, timeout_s: float) -> Trial:
        layout = Layout(model, REPLICAS, expert_services=2, proxies=["experts-0-3.1"])
        return Trial(layout, Rate(wanted.per_s or per_s, timeout_s, CONTRACTS, by_client=True))

    async with trial_of(AGNEWS, 8.0, 10.0) as classifying, trial_of(TINYTEXT, 2.0, 30.0) as generating:

        def mixture(seed: int) -> Callable[[Trial], Awaitable[None]]:
            return lambda trial: Mixture(trial, random.Random(wanted.seed + seed)).run(seconds)

        runs = await asyncio.gather(classifying.run(mixture(1)), generating.run(mixture(2)))
    met = Counter(mark.what for run in runs for mark in run.marks if mark.hits)
    kinds = {mark.what for run in runs for mark in run.marks}
    unmet = sorted(kinds - met.keys())
    targets = [Target("every kind of fault took effect", ", ".join(unmet) or f"all {len(kinds)}", not unmet)]
    return Outcome("mixed", {"classify": runs[0], "generate": runs[1]}, targets)
