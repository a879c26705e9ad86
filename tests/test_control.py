"""A running mesh is told to change: what it does, and what is left of what it had."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import Any

import pytest

from expertmesh.client import Client
from expertmesh.errors import SetupError
from expertmesh.local import control
from expertmesh.local.child import until_serving
from expertmesh.mesh_file import MeshFile
from tests.up import Up, exists, run, wait_until

HANG_S = 2
START_S = 60


@pytest.fixture(scope="module")
def up(model: Path) -> Iterator[Up]:
    """A mesh that is changed by every test, each of which leaves it healthy."""
    options = ("--expert-services", "2", "--no-full-model", "--replicas", "gateway=2", "--hang-s", str(HANG_S))
    with Up(model, *options) as running:
        yield running


def told(up: Up, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(arguments[0], "--run-dir", up.run_dir, *arguments[1:])


async def ask(up: Up, **request: Any) -> list[str]:
    return [text async for text in control.ask(up.run_dir, request)]


def replicas(up: Up, service: str) -> list[str]:
    """Names of a service's replicas in the order of the mesh file, which the state file must agree with."""
    mesh_file = MeshFile.read(up.run_dir / "mesh.toml")
    addresses = [address for one in mesh_file.services for address in one.replicas]
    processes = up.processes()
    assert [process["address"] for process in processes.values()] == addresses
    return [name for name, process in processes.items() if process["service"] == service]


def sockets(up: Up, service: str) -> set[str]:
    return {path.name for path in up.run_dir.glob(f"{service}.*.sock*")}


def test_a_scaled_service_has_so_many_replicas_and_leaves_nothing_of_others(up: Up) -> None:
    before = up.processes()
    (first,) = replicas(up, "experts-0-3")
    told_of = told(up, "scale", "experts-0-3=3", "gating=2")
    assert told_of.returncode == 0, told_of.stderr
    assert "healthy" in told_of.stdout
    more = replicas(up, "experts-0-3")
    assert (len(more), more[0], len(replicas(up, "gating"))) == (3, first, 2)
    assert len({up.pid(name) for name in more}) == 3
    assert told(up, "status").returncode == 0
    gone = [up.pid(name) for name in more[1:]]

    assert told(up, "scale", "expert=1", "gating=1").returncode == 0
    assert up.processes() == before
    assert not any(map(exists, gone))
    assert sockets(up, "experts-0-3") == {f"{first}.sock", f"{first}.sock.link"}
    assert "nothing to do" in told(up, "scale", "expert=1").stdout
    logs = {path.name for path in (up.run_dir / "logs").glob("experts-0-3.*.log")}
    assert logs == {f"{first}.log", f"{more[2]}.log"}  # the last of those that went


async def test_a_restarted_service_has_a_successor_in_its_place(up: Up) -> None:
    await ask(up, do="scale", counts={"experts-4-7": 2})
    first, second = replicas(up, "experts-4-7")
    old = up.processes()
    await ask(up, do="restart", names=[first])
    successor, same = replicas(up, "experts-4-7")
    assert same == second
    assert up.processes()[second] == old[second]
    assert int(successor.rpartition(".")[2]) > int(second.rpartition(".")[2])
    assert not exists(old[first]["pid"])
    assert sockets(up, "experts-4-7") == {f"{one}.sock{end}" for one in (successor, second) for end in ("", ".link")}
    await ask(up, do="scale", counts={"experts-4-7": 1})


def test_everything_restarts_in_the_order_of_a_request(up: Up) -> None:
    before = up.processes()
    ended = told(up, "restart", "--all")
    assert ended.returncode == 0, ended.stderr
    after = up.processes()
    assert not {process["pid"] for process in before.values()} & {process["pid"] for process in after.values()}
    assert [process["service"] for process in after.values()] == [process["service"] for process in before.values()]
    begun = [line.split()[1] for line in ended.stdout.splitlines() if "/8 " in line]
    assert begun == [*before, "restarted"]
    assert told(up, "status").returncode == 0


async def test_gateways_restart_at_their_addresses_unseen_by_a_client_of_both(up: Up, headlines: list[str]) -> None:
    before = up.processes()
    async with Client(up.grpc, timeout_s=30) as client:
        want = await client.classify(headlines[:3])
        restarting = asyncio.create_task(ask(up, do="restart", names=["gateway"]))
        calls = 0
        while not restarting.done():
            assert list((await client.classify(headlines[:3])).results) == list(want.results)
            calls += 1
        await restarting
    assert calls > 0
    after = up.processes()
    for name in ("gateway.0", "gateway.1"):
        assert after[name]["address"] == before[name]["address"]
        assert after[name]["pid"] != before[name]["pid"]


async def test_a_further_gateway_gets_an_address_of_its_own(up: Up, headlines: list[str]) -> None:
    before = up.processes()
    await ask(up, do="scale", counts={"gateway": 3})
    (third,) = set(up.processes()) - set(before)
    address = up.processes()[third]["address"]
    assert address not in [process["address"] for process in before.values()]
    assert json.loads((up.run_dir / "up.json").read_text())["grpc"] == f"{up.grpc},{address}"
    async with Client(address) as client:
        assert len((await client.classify(headlines[:2])).results) == 2
    await ask(up, do="scale", counts={"gateway": 2})
    assert up.processes() == before


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"do": "scale", "counts": {"oracle": 2}}, "no service 'oracle'; it has: tokenizer, embedding, gating"),
        ({"do": "scale", "counts": {"gating.0": 2}}, "no service 'gating.0'"),
        ({"do": "scale", "counts": {"gating": 0}}, "1 to 64 replicas, not 0"),
        ({"do": "scale", "counts": {"expert": 2, "gating": 65}}, "1 to 64 replicas, not 65"),
        ({"do": "restart", "names": ["embedding", "oracle"]}, "no service 'oracle'"),
        ({"do": "restart", "names": ["gating.77"]}, "no service 'gating.77'"),
        ({"do": "dance"}, "does not understand"),
        ({"do": "scale", "counts": {"gating": "2"}}, "does not understand"),
        ({}, "does not understand"),
    ],
)
async def test_what_cannot_be_done_is_one_clear_error_and_changes_nothing(
    up: Up, request_: dict[str, Any], said: str
) -> None:
    before = up.processes()
    with pytest.raises(SetupError, match=said):
        await ask(up, **request_)
    assert up.processes() == before


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["scale", "oracle=2"], "no service 'oracle'"),
        (["scale", "gating=two"], "'two' is no number"),
        (["restart"], "name services to restart, or --all"),
        (["restart", "--all", "gating"], "name services to restart, or --all"),
    ],
)
def test_an_error_of_the_command_is_one_line(up: Up, arguments: list[str], said: str) -> None:
    ended = told(up, *arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("error: ")
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_without_a_mesh_there_is_nothing_to_change(tmp_path: Path) -> None:
    ended = run("restart", "--run-dir", tmp_path, "--all")
    assert ended.returncode == 2
    assert "no mesh runs in" in ended.stderr


async def test_the_old_process_stays_where_a_new_one_does_not_become_healthy(up: Up) -> None:
    before, (old,) = up.processes(), replicas(up, "gating")
    number = int(old.rpartition(".")[2])
    with ExitStack() as stack:
        for other in range(number + 1, number + 20):  # whichever number is next, somebody listens there
            path = up.run_dir / f"gating.{other}.sock"
            stack.callback(path.unlink, missing_ok=True)
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(path))
            listener.listen()
        wishes: list[dict[str, Any]] = [
            {"do": "restart", "names": ["gating"]},
            {"do": "scale", "counts": {"embedding": 2, "gating": 3}},
        ]
        for wish in wishes:
            with pytest.raises(SetupError, match=r"could not start \(exit status 2\): cannot listen on"):
                await ask(up, **wish)
            assert up.processes() == before
            assert replicas(up, "gating") == [old]
    await ask(up, do="restart", names=["gating"])
    assert replicas(up, "gating") != [old]


async def test_a_second_change_meanwhile_is_refused(up: Up) -> None:
    restart: dict[str, Any] = {"do": "restart", "names": ["embedding"]}
    async with aclosing(control.ask(up.run_dir, restart)) as first:
        assert (await anext(first)).startswith("0/1 embedding")
        with pytest.raises(SetupError, match="`expertmesh restart` is under way"):
            await ask(up, do="scale", counts={"gating": 2})
        assert [text async for text in first][-1] == "1/1 restarted"


async def test_who_asked_and_went_gets_the_process_under_way_and_no_further(up: Up) -> None:
    before = up.processes()
    async with aclosing(control.ask(up.run_dir, {"do": "restart", "names": []})) as asked:
        await anext(asked)

    async with asyncio.timeout(START_S):
        while True:
            try:
                await ask(up, do="scale", counts={"gating": 1})
                break
            except SetupError:  # it is under way
                await asyncio.sleep(0.01)
    changed = [name for name in before if name not in up.processes()]
    assert changed == [next(iter(before))]


def test_only_its_owner_may_tell_it(up: Up) -> None:
    assert stat.S_IMODE((up.run_dir / control.CONTROL_SOCKET).stat().st_mode) == 0o600


async def test_a_process_that_hangs_is_killed_and_started_again(up: Up) -> None:
    (name,) = replicas(up, "experts-4-7")
    pid = up.pid(name)
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: up.pid(name) not in (0, pid), START_S)
    assert not exists(pid)
    assert up.processes()[name]["restarts"] >= 1
    async with asyncio.timeout(START_S):
        await until_serving(up.processes()[name]["address"])


async def test_a_full_disk_for_its_log_ends_no_service_and_blocks_none(up: Up) -> None:
    (name,) = replicas(up, "embedding")
    address = up.processes()[name]["address"]
    others = {other: up.pid(other) for other in up.processes() if other != name}
    log = up.run_dir / "logs" / f"{name}.log"
    log.unlink()
    log.symlink_to("/dev/full")
    for number in (signal.SIGKILL, signal.SIGTERM):  # the second one says that it stops
        pid = up.pid(name)
        os.kill(pid, number)
        wait_until(lambda old=pid: up.pid(name) not in (0, old), START_S)  # type: ignore[misc]
        async with asyncio.timeout(START_S):
            await until_serving(address)
    assert {other: up.pid(other) for other in others} == others
