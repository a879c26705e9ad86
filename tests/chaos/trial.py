"""One trial: a mesh under steady load, faults in the middle of it, time to heal, and the evidence of all that."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from tests.chaos import invariants
from tests.chaos.faults import Injector, Mark
from tests.chaos.invariants import Evidence, Finding
from tests.chaos.load import Load, Rate
from tests.chaos.mesh import Layout, Mesh
from tests.chaos.proxy import Proxy
from tests.chaos.record import Record
from tests.chaos.samples import Samples, of_model, undisturbed
from tests.chaos.vitals import Vitals, Watch

WARM_UP_S = 6.0
AFTERWARDS_S = invariants.HEAL_S + 7.0  # load goes on for so long after healing
SETTLE_S = 20.0  # KV blocks of a caller that is gone are free within 10 s
QUIET_S = 1.0

Breaking = Callable[["Trial"], Awaitable[None]]


@dataclass(frozen=True)
class Run:
    """What a trial has left.

    Attributes:
        evidence: What invariants are judged by.
        findings: How it is with each.
        marks: What was broken, and when.
        started_s: When load began, in seconds of `time.monotonic`.
        ended_s: When it ended.
        counted: Events of replicas by service and what happened.
        memory: (when, bytes) of all processes.
    """

    evidence: Evidence = field(repr=False)
    findings: Sequence[Finding]
    marks: Sequence[Mark]
    started_s: float
    ended_s: float
    counted: Mapping[str, float] = field(default_factory=dict)
    memory: Sequence[tuple[float, int]] = field(default=(), repr=False)

    @property
    def records(self) -> Sequence[Record]:
        """Of every request."""
        return self.evidence.records

    @property
    def failed(self) -> int:
        """Requests that did not end well."""
        return sum(not record.is_ok for record in self.records)

    @property
    def ok_per_s(self) -> float:
        """Goodput: requests that ended well, by the time in which they were sent."""
        return (len(self.records) - self.failed) / (self.ended_s - self.started_s)


class Trial:
    """A mesh, its proxies and what watches it; an async context manager.

    Args:
        layout: Of the mesh.
        rate: Of the load.
        samples: What is asked; by default what suits the model.
        warm_up_s: How long the load goes on, without faults, before anything is counted.

    Attributes:
        mesh: The mesh.
        injector: Breaks it.
        load: The steady one of the run that is under way.
        loads: All of that run.
    """

    def __init__(
        self, layout: Layout, rate: Rate, samples: Samples | None = None, warm_up_s: float = WARM_UP_S
    ) -> None:
        self.layout, self.rate, self._warm_up_s = layout, rate, warm_up_s
        self.samples = samples or of_model(Path(layout.model))
        self.mesh = Mesh(layout)
        self._proxies = {name: Proxy(self.mesh.proxy_of(name), self.mesh.listens(name)) for name in layout.proxies}
        self.injector = Injector(self.mesh, self._proxies)
        self.watch = Watch(self.mesh)
        self.load: Load
        self.loads: list[Load] = []
        self._expected: list[bytes] = []
        self._before: dict[str, Vitals] = {}

    async def __aenter__(self) -> Self:
        self._stack = AsyncExitStack()
        try:
            for proxy in self._proxies.values():
                await self._stack.enter_async_context(proxy)
            await self._stack.enter_async_context(self.mesh)
            self._expected = await undisturbed(self.mesh.gateways[0], self.samples)
            await self._stack.enter_async_context(self.watch)
            await self._warm_up()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def another_load(self, rate: Rate) -> Load:
        """Load beside the steady one, which is judged with it; an async context manager."""
        load = Load(self.samples, lambda: self.mesh.gateways, rate, len(self.loads))
        self.loads.append(load)
        return load

    async def run(self, breaking: Breaking, rate: Rate | None = None) -> Run:
        """Breaks things under load.

        Args:
            breaking: Does it, and returns when it is over; what was killed is started again meanwhile or afterwards.
            rate: Of the load, if it is another than the trial's.
        """
        marks, counted = len(self.injector.marks), self.watch.counted.copy()
        started_s = time.monotonic()
        self.loads = []
        async with self.another_load(rate or self.rate) as self.load:
            await breaking(self)
            await self.mesh.until_whole()
            healed_s = time.monotonic()
            await asyncio.sleep(AFTERWARDS_S)
            ended_s = time.monotonic()
        evidence = await self._settled(
            lambda after: Evidence(
                sum(load.sent for load in self.loads),
                [record for load in self.loads for record in load.records],
                {self.samples.kind: self._expected},
                healed_s,
                self._before,
                after,
                self.watch.expert_calls(counted),
            )
        )
        grown = self.watch.counted - counted
        events: Counter[str] = Counter()
        for (name, labels), count in grown.items():
            if name == "expertmesh_replica_events_total":
                has = dict(labels)
                events[f"{has.pop('service')} {' '.join(has.values())}"] += count  # type: ignore[assignment]
        own_marks = self.injector.marks[marks:]
        findings = invariants.judge(evidence)
        return Run(evidence, findings, own_marks, started_s, ended_s, events, list(self.watch.memory))

    async def _warm_up(self) -> None:
        """Load as it will be, without faults, so that memory and connections are there before they are counted."""
        async with Load(self.samples, lambda: self.mesh.gateways, self.rate, number=-1):
            await asyncio.sleep(self._warm_up_s)
        await asyncio.sleep(QUIET_S)
        self._before = await self.watch.vitals()

    async def _settled(self, evidence_of: Callable[[Mapping[str, Vitals]], Evidence]) -> Evidence:
        """The evidence, once what processes hold is back, or when there was time enough for that."""
        give_up_s = time.monotonic() + SETTLE_S
        while True:
            await asyncio.sleep(QUIET_S)
            await self.watch.look()
            evidence = evidence_of(await self.watch.vitals())
            if invariants.settled(evidence) or time.monotonic() > give_up_s:
                return evidence
