"""The calls of one pass, made again and again, each stage's by themselves: caches are as warm as can be."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.meshes import as_gateway, pids
from benchmarks.processor import IS_TOLD, processor_ns
from benchmarks.rounds import median_ms
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.dispatch import ApplyExperts, Embed, Gate, Score, StageCall
from expertmesh.local.plan import Plan
from expertmesh.rpc.deadline import Deadline
from expertmesh.v1.tokenizer_pb2 import EncodeRequest
from services.gateway.mesh_pass import MeshPass
from services.gateway.stage_calls import StageCalls

SECONDS = 0.4  # of each stage
TIMEOUT_S = 60.0
STAGES: dict[str, type[StageCall]] = {
    "embedding": Embed,
    "gating": Gate,
    "expert": ApplyExperts,
    "classifier": Score,
}


@dataclass(frozen=True)
class Warm:
    """What all calls of one stage in a pass take; milliseconds.

    Attributes:
        wall: Until the last is answered; layer after layer, the experts of one at once.
        processor: Of the stage's own processes; 0 where it is not told.
    """

    wall: float
    processor: float


async def measure(plan: Plan, manifest: Manifest, texts: Sequence[str]) -> dict[str, Warm]:
    """Each stage's calls of a pass of these texts, made from this process."""
    seen: list[StageCall] = []
    async with as_gateway(plan, manifest) as mesh:
        deadline = Deadline.after(TIMEOUT_S)
        await MeshPass(mesh, deadline, lambda call, result: seen.append(call)).run(texts)
        calls = StageCalls(mesh, deadline)
        kind2pids = pids(plan)

        async def encode() -> None:
            request = EncodeRequest(texts=texts)
            await mesh.tokenizer.call("Encode", request, deadline, lambda reply, origin: reply)

        async def ask(kind: type[StageCall]) -> None:
            for call in seen:
                if isinstance(call, kind):
                    await calls.answer(call)

        return {"tokenizer": await _repeated(encode, kind2pids["tokenizer"])} | {
            stage: await _repeated(lambda kind=kind: ask(kind), kind2pids[stage])  # type: ignore[misc]
            for stage, kind in STAGES.items()
        }


async def _repeated(work: Callable[[], Awaitable[Any]], pids_of_stage: Sequence[int]) -> Warm:
    times = 0

    async def counted() -> None:
        nonlocal times
        await work()
        times += 1

    await median_ms(counted, SECONDS / 4)
    before_ns, times = _processor_ns(pids_of_stage), 0
    wall_ms = await median_ms(counted, SECONDS)
    return Warm(wall_ms, (_processor_ns(pids_of_stage) - before_ns) / times / 1e6)


def _processor_ns(pids_of_stage: Sequence[int]) -> int:
    return processor_ns(pids_of_stage) if IS_TOLD else 0
