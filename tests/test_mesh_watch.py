"""A mesh file that changes while a mesh serves: services and replicas come and go, and answers stay the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from expertmesh.mesh_file import MeshFile, Service
from expertmesh.telemetry import metrics
from expertmesh.v1 import inference_pb2 as pb
from tests import tiny
from tests.generating import Answer, answer_of, asked, by_route, completed, model, streamed
from tests.small_mesh import SmallMesh, load_program, serving_program, small_mesh

WAIT_S = 20.0


@asynccontextmanager
async def serving(kind: str, *arguments: str) -> AsyncIterator[str]:
    """One more process' worth of a service; gives its address."""
    address = f"unix:{tiny.scratch()}/{kind}.sock"
    async with serving_program(load_program(kind, f"--model={model()}", *arguments), address):
        yield address


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not holds():
            await asyncio.sleep(0.01)


def changed(mesh: SmallMesh, change: Callable[[list[Service]], Sequence[Service]]) -> None:
    """Rewrites the file as an operator's tool would."""
    file = MeshFile.read(mesh.file)
    MeshFile(file.model, tuple(change(list(file.services)))).write(mesh.file)


def with_replicas(kind: str, *addresses: str) -> Callable[[list[Service]], Sequence[Service]]:
    return lambda services: [replace(one, replicas=addresses) if one.kind == kind else one for one in services]


def replicas_of(kind: str) -> Callable[[SmallMesh], tuple[str, ...]]:
    return lambda mesh: MeshFile.read(mesh.file).of_kind(kind)[0].replicas


def live(service: str) -> float:
    return metrics.REPLICAS_LIVE.labels(service)._value.get()


def tasks() -> set[str]:
    return {str(task.get_coro()) for task in asyncio.all_tasks() if "Replica.follow" in str(task.get_coro())}


REQUESTS = [asked(length, 12, temperature=1.0, seed=length, contract=pb.CONTRACT_MESH_ONLY) for length in (3, 40)]


async def expected(mesh: SmallMesh) -> list[list[Answer]]:
    requests = [by_route(one, pb.ROUTE_FULL_MODEL) for one in REQUESTS]
    for request in requests:
        request.contract = pb.CONTRACT_EXACT
    return await completed(mesh.client, requests)


class Load:
    """Requests one after another, from a few callers at once, until it is over; nothing may go wrong."""

    def __init__(self, mesh: SmallMesh) -> None:
        self._mesh = mesh
        self._over = asyncio.Event()
        self.answered = 0

    async def __aenter__(self) -> Load:
        self._expected = await expected(self._mesh)
        self._callers = [asyncio.create_task(self._call(number)) for number in range(len(REQUESTS))]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._over.set()
        await asyncio.gather(*self._callers)

    async def _call(self, number: int) -> None:
        while not self._over.is_set():
            messages = await streamed(self._mesh.client, REQUESTS[number])
            assert {message.route for message in messages} == {pb.ROUTE_MESH}
            assert [answer_of(messages)] == self._expected[number]
            self.answered += 1

    async def some(self) -> None:
        """Waits for a few more answers."""
        before = self.answered
        await until(lambda: self.answered >= before + 2 or any(caller.done() for caller in self._callers))


async def test_replicas_and_services_come_and_go_under_load() -> None:
    async with small_mesh() as mesh, AsyncExitStack() as more, Load(mesh) as load:
        await load.some()
        (gating,) = replicas_of("gating")(mesh)
        (expert,) = replicas_of("expert")(mesh)
        second_gating = await more.enter_async_context(serving("gating"))
        second_expert = await more.enter_async_context(serving("expert", "--experts=*:*"))

        changed(mesh, with_replicas("gating", gating, second_gating))
        changed(mesh, with_replicas("expert", expert, second_expert))
        await until(lambda: live("gating") == live("expert") == 2)
        await load.some()

        changed(mesh, with_replicas("gating", second_gating))
        await until(lambda: [one.address for one in the_mesh(mesh).gating.replicas] == [second_gating])
        assert mesh.free_blocks[0] == mesh.free_blocks[1]
        changed(mesh, with_replicas("expert", second_expert))
        await until(lambda: live("gating") == live("expert") == 1)
        await load.some()

        changed(mesh, with_replicas("gating", gating))  # the address that left is used again
        await until(lambda: mesh.free_blocks[0] < mesh.free_blocks[1])
        await load.some()


async def test_expert_services_are_split_and_joined_and_a_full_model_goes_and_comes() -> None:
    async with small_mesh() as mesh, AsyncExitStack() as more, Load(mesh) as load:
        before = MeshFile.read(mesh.file)
        full_model = before.of_kind("full_model")[0]
        low = await more.enter_async_context(serving("expert", "--experts=*:0,*:1,*:2,*:3"))
        high = await more.enter_async_context(serving("expert", "--experts=*:4,*:5,*:6,*:7"))

        def split(services: list[Service]) -> list[Service]:
            halves = [
                Service("expert", "expert", (low,), ("*:0", "*:1", "*:2", "*:3")),  # the old name holds less
                Service("expert-high", "expert", (high,), ("*:4", "*:5", "*:6", "*:7")),
            ]
            return [one for one in services if one.kind not in ("expert", "full_model")] + halves

        changed(mesh, split)
        await until(lambda: "expert-high" in [one.name for one in the_mesh(mesh).experts])
        await load.some()
        assert not the_mesh(mesh).has_full_model
        await until(lambda: ("full_model",) not in metrics.REPLICAS_LIVE._metrics)
        followed = len(tasks())

        before.write(mesh.file)
        await until(lambda: the_mesh(mesh).has_full_model)
        await load.some()
        await until(lambda: ("expert-high",) not in metrics.REPLICAS_LIVE._metrics)
        assert [one.name for one in the_mesh(mesh).experts] == ["expert"]
        assert len(tasks()) <= followed + 1
        assert the_mesh(mesh).full_model.name == full_model.name


def the_mesh(mesh: SmallMesh) -> Any:
    """The gateway's own picture of it."""
    return mesh.programs["gateway"].drain.__self__  # type: ignore[attr-defined]


async def test_a_file_that_cannot_be_right_is_refused_once_and_the_old_mesh_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def refused() -> list[str]:
        told = [record for record in caplog.records if record.getMessage() == "mesh_file_refused"]
        return [record.fields["reason"] for record in told]  # type: ignore[attr-defined]

    async with small_mesh(full_model=False) as mesh:
        good, draft = mesh.file.read_bytes(), mesh.file.with_suffix(".bad")
        services = list(MeshFile.read(mesh.file).services)

        def written(*services: Service, of: str = str(model())) -> bytes:
            MeshFile(of, services).write(draft)
            return draft.read_bytes()

        cases = [
            (b"model = [", "cannot be read"),
            (written(*(one for one in services if one.kind != "gating")), "one service of kind gating, not 0"),
            (
                written(*(replace(one, experts=("*:0",)) if one.experts else one for one in services)),
                "no service of the mesh file holds expert 1",
            ),
            (written(*services, of="elsewhere"), "another model"),
            (written(*(replace(one, replicas=("dns:x",)) for one in services)), "is not dns:///NAME:PORT"),
        ]
        for number, (content, reason) in enumerate(cases):
            draft.write_bytes(content)
            draft.replace(mesh.file)
            await until(lambda number=number: len(refused()) > number)
            assert reason in refused()[-1]
            assert len(await streamed(mesh.client, REQUESTS[0])) > 0
        mesh.file.unlink()
        await until(lambda: len(refused()) == len(cases) + 1)
        mesh.file.write_bytes(good)
        changed(mesh, with_replicas("expert", *replicas_of("expert")(mesh), f"unix:{tiny.scratch()}/nobody.sock"))
        await until(lambda: len(the_mesh(mesh).experts[0].replicas) == 2)  # it looks on
        assert len(refused()) == len(cases) + 1
        assert len(await streamed(mesh.client, REQUESTS[0])) > 0
