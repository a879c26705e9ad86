"""Which trials there are: each breaks a mesh in one way and has targets of its own beside the invariants."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from itertools import cycle, islice

from tests.chaos.faults import Mark
from tests.chaos.load import Rate
from tests.chaos.mesh import Layout
from tests.chaos.proxy import Fault
from tests.chaos.record import Record
from tests.chaos.report import Outcome, Target
from tests.chaos.samples import AGNEWS, TINYTEXT, generations
from tests.chaos.trial import Run, Trial
from tests.chaos.wanted import Wanted

FREED_S = 10.0  # within which gating frees what a gateway held that is gone
KNOWN_S = 1.0  # after a fault; by then everybody must know of it


async def replicas(wanted: Wanted) -> Outcome:
    """Two replicas of each expert, of which one is killed every 5 s, beside a run without faults."""
    seconds = wanted.seconds or 60.0
    names = [f"expert-{expert}.{replica}" for replica in range(2) for expert in range(8)]

    async def kills(trial: Trial) -> None:
        for name in islice(cycle(names), max(1, int(seconds / 5))):
            await asyncio.sleep(5.0)
            await trial.injector.kill(name)

    async def peace(trial: Trial) -> None:
        await asyncio.sleep(seconds)

    runs: dict[str, Run] = {}
    targets: list[Target] = []
    simulated = {"expert": "5", "gating": "5", "embedding": "2", "classifier": "2"}
    for place, simulate, least in (("cpu", {}, 0.95), ("simulated", simulated, 0.98)):
        layout = Layout(AGNEWS, {"expert": 2}, simulate=simulate)
        async with Trial(layout, Rate(wanted.per_s or 15.0)) as trial:
            calm = runs[f"{place}, no faults"] = await trial.run(peace)
            broken = runs[f"{place}, kills"] = await trial.run(kills)
        share = broken.ok_per_s / calm.ok_per_s
        targets += [
            none_failed(place, broken),
            Target(f"{place}: goodput at least {least:.0%} of that without faults", f"{share:.1%}", share >= least),
        ]
    return Outcome("replicas", runs, targets)


async def stops(wanted: Wanted) -> Outcome:
    """SIGSTOP of an expert replica and of one of two homes in the middle of 32 streams."""

    async def hang(trial: Trial) -> None:
        await in_the_middle(trial, 32)
        await asyncio.gather(
            trial.injector.stop("experts-0-1.0", wanted.seconds or 10.0),
            trial.injector.stop("gating.0", wanted.seconds or 10.0),
        )

    layout = Layout(TINYTEXT, {"expert": 2, "gating": 2}, expert_services=4)
    async with Trial(layout, Rate(wanted.per_s or 3.0, 60.0), generations(long=32)) as trial:
        run = await trial.run(hang)
    longest_s = max((max(record.stall_s, record.first_s) for record in run.records if record.is_ok), default=0.0)
    targets = [
        none_failed("", run),
        Target("longest stall at most 2 s", f"{longest_s:.2f} s", longest_s <= 2.0),
    ]
    return Outcome("stops", {"SIGSTOP": run}, targets)


async def lost_expert(wanted: Wanted) -> Outcome:
    """kill -9 of the only replica of an expert, then of the full model too, under all three contracts."""
    down_s = wanted.seconds or 8.0

    async def lose(trial: Trial) -> None:
        injector = trial.injector
        await asyncio.sleep(2.0)
        async with injector.down("expert-3.0"):
            await asyncio.sleep(down_s)
            async with injector.down("full_model.0"):
                await asyncio.sleep(down_s)

    contracts = (("EXACT", 1), ("MESH_ONLY", 1), ("DEGRADED_OK", 1))
    async with Trial(Layout(AGNEWS), Rate(wanted.per_s or 20.0, contracts=contracts)) as trial:
        run = await trial.run(lose)
    expert, whole = (next(mark for mark in run.marks if mark.target == name) for name in ("expert-3.0", "full_model.0"))
    one = within(run.records, expert, end_s=whole.start_s)
    both = within(run.records, whole)
    mesh_only = [record for record in (*one, *both) if record.contract == "MESH_ONLY"]
    named = [
        record for record in mesh_only
        if record.code == "UNAVAILABLE" and record.reason.get("expert") == "3" and "layer" in record.reason
    ]  # fmt: skip
    slowest_s = max((record.took_s for record in named), default=0.0)
    exact = [record for record in one if record.contract == "EXACT"]
    by_whole = [record for record in exact if record.is_ok and record.routes == ("FULL_MODEL",)]
    degraded = [record for record in both if record.contract == "DEGRADED_OK"]
    flagged = [record for record in degraded if record.is_ok and record.is_degraded]
    unharmed = [
        record for record in degraded if record.is_ok and record.routes == ("MESH",)
    ]  # had no use for the expert
    refused = [record for record in both if record.contract == "EXACT"]
    told = [record for record in refused if record.code == "UNAVAILABLE"]
    targets = [
        share_of("EXACT by FULL_MODEL while the expert is dead", by_whole, exact),
        share_of("MESH_ONLY UNAVAILABLE, naming layer and expert", named, mesh_only),
        Target("MESH_ONLY refused in under 1 s", f"{slowest_s:.2f} s", bool(named) and slowest_s < 1.0),
        share_of("DEGRADED_OK answered while full_model is dead too", flagged + unharmed, degraded),
        Target("of these flagged", str(len(flagged)), bool(flagged)),
        share_of("EXACT UNAVAILABLE while full_model is dead too", told, refused),
    ]
    return Outcome("lost-expert", {"kills": run}, targets)


async def lost_gateway(wanted: Wanted) -> Outcome:
    """kill -9 of one of two gateways in the middle of streams."""
    freed_s = [float("inf")]

    async def lose(trial: Trial) -> None:
        await in_the_middle(trial, 16)
        trial.load.is_paused = True
        await trial.injector.kill("gateway.0")
        killed_s = time.monotonic()
        while await trial.watch.sequences() > trial.load.under_way:  # those of the other gateway go on
            if time.monotonic() > killed_s + 2 * FREED_S:
                break
            await asyncio.sleep(0.1)
        else:
            freed_s[0] = time.monotonic() - killed_s
        trial.load.is_paused = False

    layout = Layout(TINYTEXT, {"gateway": 2, "gating": 2}, expert_services=2)
    async with Trial(layout, Rate(wanted.per_s or 3.0, 30.0), generations(long=16)) as trial:
        lost = trial.mesh.services()["gateway.0"].address
        run = await trial.run(lose)
    failed = [record for record in run.records if not record.is_ok]
    elsewhere = [record for record in failed if record.gateway != lost]
    retryable = [record for record in failed if record.code == "UNAVAILABLE"]
    targets = [
        Target("some request was under way at the lost gateway", str(len(failed)), bool(failed)),
        Target("nothing failed at the other gateway", f"{len(elsewhere)} failed", not elsewhere),
        share_of("failures that may be tried again", retryable, failed),
        Target(f"KV blocks are freed within {FREED_S:.0f} s", f"{freed_s[0]:.1f} s", freed_s[0] <= FREED_S),
    ]
    return Outcome("lost-gateway", {"kill": run}, targets)


async def corrupt(wanted: Wanted) -> Outcome:
    """Replies of one replica that cannot be right, in every way that there is."""
    kinds = ("NAN_ROWS", "WRONG_DIGEST", "WRONG_SHAPE", "TRUNCATED", "GARBAGE", "OUT_OF_MEMORY")
    seconds = wanted.seconds or 3.0
    seen: dict[str, tuple[float, float]] = {}

    async def spoil(trial: Trial) -> None:
        injector = trial.injector
        for kind in kinds:
            await injector.misbehave("expert-3.0", kind, seconds)
            await asyncio.sleep(6.0)  # in which it is asked again and returns
        for directions in (("to gateway",), ("to replica",)):
            fault = Fault(directions, corrupt=1.0, seed=wanted.seed)
            await injector.spoil("expert-3.0", fault, f"bytes {directions[0]}", seconds)
            await asyncio.sleep(6.0)
        log = trial.mesh.log("gateway.0")
        address = trial.mesh.proxy_of("expert-3.0")
        seen["log"] = (sum(address in line and '"WARNING"' in line.upper() for line in log.splitlines()), 0.0)

    layout = Layout(AGNEWS, {"expert-3": 2}, proxies=["expert-3.0"])
    async with Trial(layout, Rate(wanted.per_s or 20.0)) as trial:
        run = await trial.run(spoil)
    unmet = [mark.what for mark in run.marks if not mark.hits]
    counted = {name: run.counted.get(name, 0.0) for name in ("expert-3 corrupt", "expert-3 ejected")}
    targets = [
        none_failed("", run),
        Target("every fault was met by a call", ", ".join(unmet) or "all", not unmet),
        Target("the replica is counted as corrupt or ejected", str(counted), sum(counted.values()) >= len(kinds)),
        Target("the log names the replica", f"{seen['log'][0]:.0f} times", seen["log"][0] >= len(kinds)),
    ]
    return Outcome("corrupt", {"replies": run}, targets)


async def in_the_middle(trial: Trial, streams: int) -> None:
    """Begins streams and returns when all have begun and none has ended."""
    trial.load.burst(streams)
    while trial.load.streaming < streams:
        await asyncio.sleep(0.01)


def within(records: Sequence[Record], mark: Mark, end_s: float | None = None) -> list[Record]:
    """The requests that were sent while a fault went on, and was known of."""
    until_s = mark.end_s if end_s is None else end_s
    return [record for record in records if mark.start_s + KNOWN_S <= record.start_s and record.end_s < until_s]


def none_failed(place: str, run: Run) -> Target:
    """That no request failed."""
    return Target(f"{place}: 0 failed".removeprefix(": "), f"{run.failed} of {run.evidence.sent}", not run.failed)


def share_of(name: str, right: Sequence[Record], every: Sequence[Record]) -> Target:
    """That all of some requests, of which there are any, ended rightly."""
    return Target(name, f"{len(right)} of {len(every)}", bool(every) and len(right) == len(every))
