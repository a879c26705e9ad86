"""The image, the compose file and what they stand on. Only where a Docker engine answers is anything built and run."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc.aio
import httpx
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from expertmesh.client import Client
from expertmesh.mesh_file import KINDS, MeshFile
from expertmesh.rpc import probe
from expertmesh.v1 import inference_pb2 as pb
from tests import tiny

ROOT = Path(__file__).resolve().parent.parent
COMPOSE_FILE = ROOT / "docker-compose.all.yml"
COMPOSE = ("docker", "compose", "--env-file", os.devnull, "--project-name", "expertmesh-test", "-f", str(COMPOSE_FILE))
SERVICE = re.compile(
    r"^  ([a-z0-9-]+):\n    <<: \*service\n(?:      .*\n|    (?!command).*\n)*    command: \[(.*)\]$", re.M
)
ROUTES = {pb.ROUTE_MESH: "/api/v1/infer", pb.ROUTE_FULL_MODEL: "/api/v2/infer"}


def start(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "services", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("arguments", [(), ("experts",), ("--help",), ("gateway.http",)])
def test_an_unknown_service_ends_with_one_line_that_names_all(arguments: tuple[str, ...]) -> None:
    ended = start(*arguments)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    assert all(kind in ended.stderr for kind in KINDS)


@pytest.mark.parametrize("name", ["full-model", "full_model"])
def test_a_service_is_started_by_its_name_with_the_other_arguments(name: str) -> None:
    ended = start(name, "--threads=0")
    assert ended.returncode == 2
    assert ended.stderr == "error: threads must be in [1, 1024]\n"


def test_compose_runs_exactly_what_its_mesh_file_names() -> None:
    mesh = MeshFile.read(ROOT / "deploy" / "compose" / "mesh.toml")
    commands = {name: re.split(r",\s*", command) for name, command in SERVICE.findall(COMPOSE_FILE.read_text())}
    assert list(commands) == [*(service.name for service in mesh.services), "gateway"]
    for service in mesh.services:
        command = [argument.strip('"') for argument in commands[service.name]]
        assert command[0].replace("-", "_") == service.kind
        assert service.replicas == (f"dns:///{service.name}:50051",)
        if service.kind == "expert":
            assert f"--experts={','.join(service.experts)}" in command
            assert any(f"{service.name.upper().replace('-', '_')}_DEVICE:-" in argument for argument in command)
    held = [pattern for service in mesh.of_kind("expert") for pattern in service.experts]
    assert held == [f"*:{expert}" for expert in range(8)]


def test_the_gateway_waits_for_every_other_service() -> None:
    text = COMPOSE_FILE.read_text()
    waited = re.findall(r"^      ([a-z0-9-]+): \*healthy$", text, re.M)
    assert [*waited, "gateway"] == [name for name, _ in SERVICE.findall(text)]


def test_what_the_image_copies_is_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", (ROOT / "Dockerfile").read_text(), re.M)
    assert kept - {"wheels"} == {source for line in copied for source in line.split()}


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        (health_pb2.HealthCheckResponse.SERVING, "SERVING"),
        (health_pb2.HealthCheckResponse.NOT_SERVING, "NOT_SERVING"),
        (health_pb2.HealthCheckResponse.UNKNOWN, "UNKNOWN"),
    ],
)
async def test_the_probe_tells_what_health_says(status: int, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    health = HealthServicer()
    await health.set("", status)
    async with tiny.served((health_pb2_grpc.add_HealthServicer_to_server, health), guarded=False) as address:
        exit_status = await asyncio.to_thread(probe.main, [address])
    assert capsys.readouterr().out == f"{expected}\n"
    assert exit_status == (0 if expected == "SERVING" else 1)


async def test_the_probe_of_a_server_without_health_is_not_serving() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        assert await asyncio.to_thread(probe.health, "127.0.0.1", port) == "UNKNOWN"
    finally:
        await server.stop(None)


def test_the_probe_gives_up_on_who_does_not_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as mute:
        port = mute.getsockname()[1]
        with pytest.raises(TimeoutError):
            probe.health("127.0.0.1", port, timeout_s=0.1)
    assert probe.main([f"127.0.0.1:{port}"]) == 1
    assert capsys.readouterr().out.startswith("no answer: ")


@pytest.mark.parametrize("arguments", [[], ["50051"], ["host:name"], ["a:1", "b:2"]])
def test_the_probe_says_how_it_is_used(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert probe.main(arguments) == 2
    assert "HOST:PORT" in capsys.readouterr().err


def compose(*arguments: str, timeout_s: float = 180) -> str:
    """Runs `docker compose ARGUMENTS` on a project of the tests' own, with free ports; gives its output."""
    environment = {**os.environ, "IMAGE": "expertmesh:test", "GRPC_PORT": "0", "HTTP_PORT": "0"}
    done = subprocess.run(
        [*COMPOSE, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False, env=environment
    )
    assert done.returncode == 0, f"docker compose {' '.join(arguments)}: {done.stderr[-4000:]}"
    return done.stdout


def why_not() -> str:
    """Why containers cannot be run here; empty if they can."""
    for command in (["docker", "version"], ["docker", "compose", "version"]):
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return f"no containers here: {error}"
        if done.returncode:
            return f"no containers here: `{' '.join(command)}` says: {done.stderr.strip()[:200]}"
    return ""


WHY_NOT = why_not()
needs_engine = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.fixture(scope="module")
def containers() -> Iterator[dict[int, str]]:
    """The whole mesh, built and running; the addresses under which the ports 50051 and 8080 are published."""
    try:
        compose("up", "--build", "--wait", timeout_s=1800)
        yield {port: compose("port", "gateway", str(port)).strip() for port in (50051, 8080)}
    finally:
        compose("down", "--volumes")


def bits(response: pb.ClassifyResponse) -> list[bytes]:
    return [np.float32(result.logits).tobytes() for result in response.results]


@needs_engine
def test_every_container_is_healthy(containers: dict[int, str]) -> None:
    lines = compose("ps", "--format", "{{.Service}} {{.Health}}").splitlines()
    names = [name for name, _ in SERVICE.findall(COMPOSE_FILE.read_text())]
    assert sorted(lines) == sorted(f"{name} healthy" for name in names)


@needs_engine
def test_the_gateway_is_published_on_this_machine_only(containers: dict[int, str]) -> None:
    assert all(address.startswith("127.0.0.1:") for address in containers.values())


@needs_engine
@pytest.mark.parametrize("route", ROUTES)
async def test_containers_answer_the_same_bits_as_local_processes(
    containers: dict[int, str], client: Client, headlines: list[str], route: pb.Route
) -> None:
    local = await client.classify(headlines, route=route)
    async with Client(containers[50051]) as remote:
        contained = await remote.classify(headlines, route=route)
    assert all(result.exact and result.route == route for result in contained.results)
    assert bits(contained) == bits(local), (contained.results[0].profile, local.results[0].profile)
    async with httpx.AsyncClient(base_url=f"http://{containers[8080]}") as http:
        for text, result in zip(headlines[:4], local.results, strict=False):
            reply = (await http.post(ROUTES[route], json={"text": text}, timeout=30)).json()
            assert np.float32(list(reply["logits"].values())).tobytes() == np.float32(result.logits).tobytes()


@needs_engine
async def test_a_stopped_expert_ends_in_order_and_the_full_model_answers(
    containers: dict[int, str], client: Client, headlines: list[str]
) -> None:
    local = await client.classify(headlines)
    compose("stop", "expert-7")
    assert compose("ps", "--all", "--format", "{{.ExitCode}}", "expert-7").strip() == "0"
    async with Client(containers[50051]) as remote:
        contained = await remote.classify(headlines)
    assert {result.route for result in contained.results} == {pb.ROUTE_FULL_MODEL}
    assert bits(contained) == bits(local)
