from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from expertmesh.checkpoint.manifest import Manifest, expert_part
from expertmesh.errors import SetupError, Unavailable
from expertmesh.rpc import server
from expertmesh.rpc.link.channel import LinkChannel
from expertmesh.rpc.server import Program as Loaded
from expertmesh.rpc.server import Servicer
from expertmesh.rpc.settings import LINK_SUFFIX, ModelSettings, Settings
from expertmesh.serving.stage import open_device
from expertmesh.telemetry.tracing import OFF
from expertmesh.v1.description_pb2 import DescribeRequest, DescribeResponse
from expertmesh.v1.description_pb2_grpc import DescriptionServiceStub
from expertmesh.v1.embedding_pb2 import EmbedRequest
from expertmesh.v1.embedding_pb2_grpc import EmbeddingServiceStub, add_EmbeddingServiceServicer_to_server
from services.embedding.__main__ import load as load_embedding
from tests import tiny
from tests.doubles.honest import Honest

ROOT = Path(__file__).resolve().parent.parent
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
START_S = 30.0
GRPC_LOG = re.compile(r"[IWE]\d{4} [\d:.]+ +\d+ \w+\.cc:")


def command(program: str, *arguments: str) -> list[str]:
    return [sys.executable, "-P", "-m", f"services.{program}", *arguments]


class Program:
    """A program in a process of its own, and what it logged."""

    def __init__(self, program: str, *arguments: str) -> None:
        self._arguments = command(program, *arguments)
        self.log: list[dict[str, Any]] = []

    async def __aenter__(self) -> Program:
        self.process = await asyncio.create_subprocess_exec(
            *self._arguments, cwd=ROOT, stderr=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self.process.returncode is None:
            self.process.kill()
        await self.process.communicate()

    async def until(self, event: str) -> dict[str, Any]:
        """The log line of an event; reads what comes before it."""
        async with asyncio.timeout(START_S):
            while line := await self.process.stderr.readline():
                self.log.append(json.loads(line))
                if self.log[-1]["event"] == event:
                    return self.log[-1]
        raise AssertionError(f"no event {event}: {self.log}")


@asynccontextmanager
async def running(program: str, *arguments: str) -> AsyncIterator[tuple[Program, str]]:
    async with Program(program, *arguments) as started:
        yield started, (await started.until("ready"))["address"]


def refused(program: str, *arguments: str) -> str:
    """The one line of a program that does not start."""
    ended = subprocess.run(command(program, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=START_S)
    assert ended.returncode == 2, ended
    assert ended.stdout == ""
    (line,) = (line for line in ended.stderr.splitlines() if not GRPC_LOG.match(line))
    return line


# A program that runs


async def test_a_program_serves_says_what_it_is_and_stops_gracefully() -> None:
    address = f"unix:{tiny.scratch()}/embedding.sock"
    arguments = ["--model", str(tiny.model()), "--listen", address, "--metrics", "127.0.0.1:0", "--name", "embedding-7"]
    async with running("embedding", *arguments) as (program, ready), grpc.aio.insecure_channel(ready) as channel:
        assert ready == address
        path = address.removeprefix("unix:")
        assert os.stat(path).st_mode & 0o777 == 0o600

        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "expertmesh.v1.EmbeddingService"):
            reply = await health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
            assert reply.status == SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="nothing"), timeout=10)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND

        described = await DescriptionServiceStub(channel).Describe(DescribeRequest(), timeout=10)
        manifest = Manifest.read(tiny.model())
        assert described.kind == "embedding"
        assert {part.name: part.digest for part in described.parts} == {"embedding": manifest.parts["embedding"].digest}
        assert described.model_digest == manifest.digest
        assert described.profile.endswith(described.fingerprint)
        assert described.device == "cpu"
        assert await exposition(described.metrics_address) == 200

        ids = tiny.wire_ids(1, 2, 3)
        embed = EmbeddingServiceStub(channel).Embed
        assert (await embed(EmbedRequest(ids=ids, lengths=tiny.wire_ids(3)), timeout=10)).rows.shape == [3, tiny.WIDTH]

        program.process.send_signal(signal.SIGTERM)
        await program.until("stopping")
        await program.until("stopped")
        assert await program.process.wait() == 0
        assert not os.path.exists(path)  # noqa: ASYNC240
        assert {line["service"] for line in program.log} == {"embedding-7"}


async def exposition(address: str) -> int:
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /metrics HTTP/1.0\r\n\r\n")
    await writer.drain()
    answer = await reader.read()
    writer.close()
    await writer.wait_closed()
    assert b"expertmesh_request_seconds" in answer
    return int(answer.split()[1])


# The same in this process: readiness, reflection, a drain


@asynccontextmanager
async def served(settings: Settings, load: Callable[..., Any]) -> AsyncIterator[grpc.aio.Channel]:
    """Runs what `run` runs, in this loop, and stops it as a process is stopped."""
    address = settings.listen
    task = asyncio.create_task(server._serve(settings, "embedding", load))
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            waiting = asyncio.ensure_future(channel.channel_ready())
            await asyncio.wait({task, waiting}, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
            assert waiting.done()
            yield channel
    finally:
        if not task.done():
            os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(START_S):
            await task
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().remove_signal_handler(number)


def listen() -> str:
    return f"unix:{tiny.scratch()}/program.sock"


def socket_of_links(address: str) -> Path:
    return Path(address.removeprefix("unix:") + LINK_SUFFIX)


async def next_status(watch: Any) -> int:
    async with asyncio.timeout(10):
        return (await watch.read()).status


async def test_health_follows_readiness_and_the_stop() -> None:
    ready = False
    entered: list[str] = []

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        entered.append("in")
        yield
        entered.append("out")

    def load(settings: Settings, tracing: Any) -> Loaded:
        servicer = Servicer("expertmesh.v1.EmbeddingService", add_EmbeddingServiceServicer_to_server, Honest())
        return Loaded([servicer], DescribeResponse(kind="embedding"), lifespan(), lambda: ready)

    async with served(Settings(listen=listen(), grace_s=0.05, drain_s=0.05), load) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches = [
            health.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("", "expertmesh.v1.EmbeddingService")
        ]
        assert [await next_status(watch) for watch in watches] == [NOT_SERVING, NOT_SERVING]
        assert entered == ["in"]
        ready = True
        assert [await next_status(watch) for watch in watches] == [SERVING, SERVING]
        os.kill(os.getpid(), signal.SIGTERM)
        assert [await next_status(watch) for watch in watches] == [NOT_SERVING, NOT_SERVING]
    assert entered == ["in", "out"]


async def test_reflection_lists_every_service_and_gives_its_description() -> None:
    settings = ModelSettings(listen=listen(), model=tiny.model(), grace_s=0.05)
    async with served(settings, load_embedding) as channel:
        request = reflection_pb2.ServerReflectionRequest
        stream = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            iter([request(list_services=""), request(file_containing_symbol="expertmesh.v1.EmbeddingService")])
        )
        listed, described = [reply async for reply in stream]
    assert {service.name for service in listed.list_services_response.service} == {
        "expertmesh.v1.EmbeddingService",
        "expertmesh.v1.DescriptionService",
        "expertmesh.v1.LinkService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    file = FileDescriptorProto.FromString(described.file_descriptor_response.file_descriptor_proto[0])
    assert [method.name for method in file.service[0].method] == ["Embed"]


async def test_a_running_call_is_answered_before_the_stop() -> None:
    double = Honest(5.0)
    double.go_on.clear()

    def load(settings: Settings, tracing: Any) -> Loaded:
        servicer = Servicer("expertmesh.v1.EmbeddingService", add_EmbeddingServiceServicer_to_server, double)
        return Loaded([servicer], DescribeResponse(kind="embedding"))

    async with served(Settings(listen=listen(), grace_s=20), load) as channel:
        call = EmbeddingServiceStub(channel).Embed(EmbedRequest(), timeout=20)
        await double.arrived.wait()
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
        assert await next_status(watch) == SERVING
        os.kill(os.getpid(), signal.SIGTERM)
        assert await next_status(watch) == NOT_SERVING
        watch.cancel()
        answer = asyncio.ensure_future(call)
        ended, _ = await asyncio.wait({answer}, timeout=0.2)
        assert not ended, "the stop has begun, and the call still has its grace"
        double.go_on.set()
        assert (await answer).rows.shape == [1, 2]


async def test_a_call_over_a_link_is_answered_before_the_stop() -> None:
    double = Honest(5.0)
    double.go_on.clear()
    left = asyncio.Event()
    address = listen()

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        yield
        left.set()

    def load(settings: Settings, tracing: Any) -> Loaded:
        servicer = Servicer("expertmesh.v1.EmbeddingService", add_EmbeddingServiceServicer_to_server, double)
        return Loaded([servicer], DescribeResponse(kind="embedding"), lifespan())

    async with served(Settings(listen=address, grace_s=20), load) as channel:
        link = LinkChannel(address, channel, "embedding")
        await link.open(5)
        call = asyncio.ensure_future(EmbeddingServiceStub(link).Embed(EmbedRequest(), 20))  # type: ignore[arg-type]
        await double.arrived.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(left.wait(), 0.3)  # the stop has begun, and the call still has its grace
        double.go_on.set()
        assert (await call).rows.shape == [1, 2]
        await asyncio.wait_for(link.ended.wait(), 5)
    assert not socket_of_links(address).exists()


async def test_a_call_over_a_link_that_does_not_end_is_cut_off_after_the_grace() -> None:
    double = Honest()
    double.go_on.clear()
    address = listen()

    def load(settings: Settings, tracing: Any) -> Loaded:
        servicer = Servicer("expertmesh.v1.EmbeddingService", add_EmbeddingServiceServicer_to_server, double)
        return Loaded([servicer], DescribeResponse(kind="embedding"))

    async with served(Settings(listen=address, grace_s=0.05), load) as channel:
        link = LinkChannel(address, channel, "embedding")
        await link.open(5)
        call = asyncio.ensure_future(EmbeddingServiceStub(link).Embed(EmbedRequest(), 20))  # type: ignore[arg-type]
        await double.arrived.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Unavailable):
            await asyncio.wait_for(call, 5)


def load_double(double: Honest, is_idle: Callable[[], bool] = lambda: True) -> Callable[..., Any]:
    def load(settings: Settings, tracing: Any) -> Loaded:
        servicer = Servicer("expertmesh.v1.EmbeddingService", add_EmbeddingServiceServicer_to_server, double)
        return Loaded([servicer], DescribeResponse(kind="embedding"), is_idle=is_idle)

    return load


async def test_new_calls_are_refused_while_running_ones_end() -> None:
    double = Honest(5.0)
    double.go_on.clear()
    async with served(Settings(listen=listen(), grace_s=20), load_double(double)) as channel:
        stub = EmbeddingServiceStub(channel)
        running = stub.Embed(EmbedRequest(), timeout=20)
        await double.arrived.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        double.arrived.clear()
        codes = set()
        async with asyncio.timeout(10):
            while not codes:  # until then it is served, and waits
                call = stub.Embed(EmbedRequest(), timeout=0.2)
                codes = {await call.code()} - {grpc.StatusCode.DEADLINE_EXCEEDED}
        assert codes == {grpc.StatusCode.UNAVAILABLE}
        double.go_on.set()
        assert (await running).rows.shape == [1, 2]


async def test_what_does_not_end_within_the_grace_is_cut_off_with_a_status_that_may_be_retried() -> None:
    double = Honest()
    double.go_on.clear()
    async with served(Settings(listen=listen(), grace_s=0.05), load_double(double)) as channel:
        call = EmbeddingServiceStub(channel).Embed(EmbedRequest(), timeout=20)
        await double.arrived.wait()
        os.kill(os.getpid(), signal.SIGTERM)
        async with asyncio.timeout(10):
            assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_it_serves_on_until_its_callers_have_let_go() -> None:
    double, address, idle = Honest(5.0), listen(), False
    async with served(Settings(listen=address, grace_s=20), load_double(double, lambda: idle)) as channel:
        link, heard = LinkChannel(address, channel, "embedding"), asyncio.Event()
        link.on_drain = heard.set
        await link.open(5)
        embed = EmbeddingServiceStub(link).Embed  # type: ignore[arg-type]
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(heard.wait(), 5)
        assert (await DescriptionServiceStub(channel).Describe(DescribeRequest(), timeout=5)).draining
        for _ in range(3):
            assert (await embed(EmbedRequest(), 5)).rows.shape == [1, 2]
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(link.ended.wait(), 0.4)  # nobody calls, but something is kept for later
        idle = True
        await asyncio.wait_for(link.ended.wait(), 5)


async def test_a_socket_of_links_that_a_successor_took_over_is_left_to_it() -> None:
    address = listen()
    path = socket_of_links(address)
    async with served(Settings(listen=address, grace_s=0.05), load_double(Honest())):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind(str(path))
        taken = path.stat().st_ino
    assert path.stat().st_ino == taken


# Programs that do not start


def test_a_port_in_use_gives_one_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        line = json.loads(refused("tokenizer", "--model", str(tiny.model()), "--listen", address))
        assert line["event"] == "cannot_start"
        assert line["reason"].startswith(f"cannot listen on {address}")
        line = json.loads(refused("tokenizer", "--model", str(tiny.model()), "--metrics", address))
        assert line["reason"].startswith(f"cannot listen on {address} for metrics")


def test_a_socket_that_serves_is_not_taken_over() -> None:
    path = tiny.scratch() / "taken.sock"
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        taken.listen()
        line = json.loads(refused("tokenizer", "--model", str(tiny.model()), "--listen", f"unix:{path}"))
        assert line["reason"].startswith(f"cannot listen on unix:{path}")
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(5)
            client.connect(str(path))


def test_a_missing_model_gives_one_line_and_leaves_no_socket() -> None:
    path = tiny.scratch() / "tokenizer.sock"
    line = json.loads(refused("tokenizer", "--model", "/nowhere/model", "--listen", f"unix:{path}"))
    assert line["reason"] == "there is no model folder /nowhere/model"
    assert not path.exists()


def test_a_bad_setting_gives_one_line() -> None:
    assert refused("tokenizer", "--threads=none") == "error: --threads = 'none' is no int"


def test_a_changed_weight_file_is_refused_by_its_part(tmp_path: Path) -> None:
    folder = tiny.copy_of(tiny.model(), tmp_path / "model")
    part = expert_part(1, 3)
    path = folder / f"{part}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert hashlib.sha256(data).digest() != Manifest.read(folder).parts[part].digest
    line = json.loads(refused("expert", "--model", str(folder), "--experts", "*:3", "--device", "cpu"))
    assert line["reason"].startswith(f"part {part}: the SHA-256")


@pytest.mark.parametrize("name", ["cuda:99", "abacus", "", "cpu:x", "meta?"])
def test_a_device_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(SetupError, match="is not there"):
        open_device(name, 1)


def test_a_program_without_its_device_does_not_load() -> None:
    with pytest.raises(SetupError, match="device 'cuda:99' is not there"):
        load_embedding(ModelSettings(model=tiny.model(), device="cuda:99"), OFF)
