"""Chaos, in short: one small mesh that generates, every kind of fault once, and every invariant afterwards."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.chaos.invariants import INVARIANTS
from tests.chaos.load import Rate
from tests.chaos.mesh import Layout
from tests.chaos.proxy import Fault
from tests.chaos.report import Outcome, write
from tests.chaos.samples import TINYTEXT
from tests.chaos.trial import Run, Trial

EXPERT, OTHER, HOME = "experts-0-7.0", "experts-0-7.1", "gating.0"


async def break_everything(trial: Trial) -> None:
    injector = trial.injector
    for kind in ("NAN_ROWS", "WRONG_DIGEST"):
        await trial.load.at_least(3)
        await injector.misbehave(OTHER, kind, 1.0)
        await until_live(trial, OTHER)
    await injector.spoil(EXPERT, Fault(corrupt=1.0), "changed bytes", 1.0)
    await until_live(trial, EXPERT)
    await injector.spoil(EXPERT, Fault(swallow=True), "blackhole", 2.5)
    await injector.stop(HOME, 2.5)
    await asyncio.gather(injector.kill(HOME), injector.kill(OTHER))


async def until_live(trial: Trial, name: str) -> None:
    """Waits until the gateway has all replicas of a service again."""
    service = trial.mesh.services()[name].service
    gateway = trial.mesh.of_kind("gateway")[0]
    key = ("expertmesh_replicas_live", frozenset({("service", service)}))
    async with asyncio.timeout(30):
        while (await trial.watch.metrics(gateway))[key] < 2:
            await asyncio.sleep(0.1)


@pytest.fixture(scope="module")
def run() -> Run:
    async def ran() -> Run:
        layout = Layout(TINYTEXT, {"expert": 2, "gating": 2}, expert_services=1, proxies=[EXPERT])
        async with Trial(layout, Rate(3.0, 20.0), warm_up_s=3.0) as trial:
            return await trial.run(break_everything)

    return asyncio.run(ran())


def test_every_fault_took_effect(run: Run) -> None:
    assert [mark.what for mark in run.marks if not mark.hits] == []
    kinds = {"nan rows", "wrong digest", "changed bytes", "blackhole", "stop", "kill"}
    assert {mark.what for mark in run.marks} == kinds


@pytest.mark.parametrize("name", INVARIANTS)
def test_invariant(run: Run, name: str) -> None:
    finding = next(finding for finding in run.findings if finding.name == name)
    assert finding.breaches == (), finding.figure


def test_no_request_failed(run: Run) -> None:
    assert [(record.code, record.reason) for record in run.records if not record.is_ok] == []


def test_the_report_of_a_run_is_written(run: Run, tmp_path: Path) -> None:
    write([Outcome("short", {"all faults": run}, [])], tmp_path)
    assert (tmp_path / "short-all-faults.svg").read_text().startswith("<svg ")
    assert '"sent"' in (tmp_path / "chaos.json").read_text()
