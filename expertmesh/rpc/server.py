"""How every program of the mesh runs: bind, load, serve, drain, stop."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from expertmesh.errors import SetupError
from expertmesh.rpc import heap
from expertmesh.rpc.channel import SERVER_OPTIONS, message_limits
from expertmesh.rpc.guard import Guard
from expertmesh.rpc.interceptor import CallInterceptor
from expertmesh.rpc.link.servicer import LinkServicer
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.settings import Settings, parse_host_port
from expertmesh.telemetry import logging as log
from expertmesh.telemetry import metrics, tracing
from expertmesh.v1 import description_pb2, description_pb2_grpc

SettingsT = TypeVar("SettingsT", bound=Settings)
EXIT_SETUP_ERROR = 2
REPLIES_S = 0.2  # replies that have been given get so long to be sent
LAST_CALLS_S = 1.0  # calls that came while callers had not let go get so long
WITHOUT_LINKS = ("gateway",)  # its callers are not of the mesh


@dataclass(frozen=True)
class Servicer:
    """An implementation and how it is registered.

    Attributes:
        name: Full name of the gRPC service.
        add: The generated `add_…_to_server`.
        implementation: The object with its methods.
    """

    name: str
    add: Callable[[Any, grpc.aio.Server], None]
    implementation: Any


@dataclass(frozen=True)
class Program:
    """A loaded program.

    Attributes:
        servicers: What it offers beside health, reflection and Describe.
        description: What it answers to Describe.
        lifespan: What runs while it serves; it is entered before the first call and left after the last.
        is_ready: Whether health says SERVING; asked twice a second.
        drain: Is told that the program is stopping, before new calls are refused.
        is_idle: Whether nothing is kept for callers that come again, such as sequences in a cache.
    """

    servicers: list[Servicer]
    description: description_pb2.DescribeResponse
    lifespan: AbstractAsyncContextManager[Any] | None = None
    is_ready: Callable[[], bool] = field(default=lambda: True)
    drain: Callable[[], None] = field(default=lambda: None)
    is_idle: Callable[[], bool] = field(default=lambda: True)


class DescriptionServicer(description_pb2_grpc.DescriptionServiceServicer):
    """Answers Describe with what was loaded."""

    def __init__(self, description: description_pb2.DescribeResponse) -> None:
        self._description = description

    async def Describe(self, request: Any, context: grpc.aio.ServicerContext) -> description_pb2.DescribeResponse:
        """What this program holds."""
        return self._description


def run(settings: SettingsT, kind: str, load: Callable[[SettingsT, tracing.Tracing], Program]) -> int:
    """Runs a program until SIGTERM or SIGINT.

    Args:
        settings: Its settings.
        kind: What kind of service it is.
        load: Loads what it serves; called inside the running event loop, once its port is bound.

    Returns:
        The exit status: 0 after a stop, 2 when it could not start (and one line says why).
    """
    log.configure(settings.name or kind, settings.log_level)
    heap.keep_freed()
    try:
        asyncio.run(_serve(settings, kind, load))
    except SetupError as error:
        log.event("cannot_start", level=logging.ERROR, reason=str(error))
        return EXIT_SETUP_ERROR
    return 0


async def _serve(settings: SettingsT, kind: str, load: Callable[[SettingsT, tracing.Tracing], Program]) -> None:
    started_s = time.monotonic()
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    async with AsyncExitStack() as stack:
        traces = tracing.start(kind)
        stack.callback(traces.shutdown)
        guard = Guard()
        server = grpc.aio.server(
            interceptors=[*traces.server_interceptors, CallInterceptor(guard)],
            options=(*SERVER_OPTIONS, *message_limits(settings.max_message_bytes)),
        )
        address = _bind(server, settings.listen)
        if address.startswith("unix:"):
            stack.callback(_unlinker(Path(address.removeprefix("unix:"))))
        metrics_address = ""
        if settings.metrics:
            metrics_server = stack.enter_context(_metrics_server(settings.metrics))
            metrics_address = f"{metrics_server.host}:{metrics_server.port}"
        program = load(settings, traces)
        program.description.metrics_address = metrics_address
        link = LinkServicer(guard, traces, settings.max_message_bytes)
        health = register(server, program, guard, link)
        if program.lifespan is not None:
            await stack.enter_async_context(program.lifespan)
        if program.description.links:
            await stack.enter_async_context(link.listening(address))
        await server.start()
        heap.leave_loaded_alone()
        try:
            await stack.enter_async_context(_health(health, program))
            log.event("ready", address=address, metrics=metrics_address, seconds=round(time.monotonic() - started_s, 3))
            await stopping.wait()
        finally:
            program.drain()
            await _stop(server, health, guard, link, program, settings)
    log.event("stopped")


def _bind(server: grpc.aio.Server, listen: str) -> str:
    try:
        taken = listen.startswith("unix:") and _is_served(listen.removeprefix("unix:"))
        port = 0 if taken else server.add_insecure_port(listen)
    except RuntimeError:
        port = 0
    if port == 0:
        raise SetupError(f"cannot listen on {listen}: it is in use or not allowed; choose another with --listen")
    if listen.startswith("unix:"):
        os.chmod(listen.removeprefix("unix:"), 0o600)
        return listen
    return f"{listen.rpartition(':')[0]}:{port}"


def _unlinker(path: Path) -> Callable[[], None]:
    """What removes a socket's path, unless a successor has taken it over."""
    own = path.stat().st_ino

    def unlink() -> None:
        with suppress(FileNotFoundError):
            if path.stat().st_ino == own:
                path.unlink()

    return unlink


def _is_served(path: str) -> bool:
    """Whether somebody listens on a unix socket; gRPC would take it over without a word."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1.0)
        try:
            client.connect(path)
        except TimeoutError:
            return True
        except OSError:
            return False
    return True


def _metrics_server(address: str) -> metrics.MetricsServer:
    try:
        return metrics.MetricsServer(*parse_host_port(address, "metrics"))
    except OSError as error:
        raise SetupError(f"cannot listen on {address} for metrics: {error.strerror}") from None


def register(server: grpc.aio.Server, program: Program, guard: Guard, link: LinkServicer) -> HealthServicer:
    """Puts everything that a program offers on a server; gives what answers for its health."""
    guard.origin = Origin.of_description(program.description).to_metadata()
    program.description.links = program.description.kind not in WITHOUT_LINKS
    described = Servicer(
        description_pb2.DESCRIPTOR.services_by_name["DescriptionService"].full_name,
        description_pb2_grpc.add_DescriptionServiceServicer_to_server,
        DescriptionServicer(program.description),
    )
    servicers = [*program.servicers, described]
    for servicer in servicers:
        servicer.add(servicer.implementation, server)
    names = [servicer.name for servicer in servicers]
    if program.description.links:
        for servicer in program.servicers:
            servicer.add(servicer.implementation, link)
        link.description = program.description
        names.append(link.add_to_server(server))
    health = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection([*names, health_name, reflection.SERVICE_NAME], server)
    return health


@asynccontextmanager
async def _health(health: HealthServicer, program: Program) -> AsyncIterator[None]:
    """Keeps the health of the whole program and of each of its services up to date."""

    async def follow() -> None:
        while True:
            await asyncio.sleep(0.5)
            metrics.TASKS.set(len(asyncio.all_tasks()))
            try:
                await _say(health, program, program.is_ready())
            except Exception:
                log.event("internal_error", level=logging.ERROR, exc_info=True)

    await _say(health, program, program.is_ready())
    task = asyncio.create_task(follow())
    try:
        yield
    finally:
        task.cancel()


async def _say(health: HealthServicer, program: Program, ready: bool) -> None:
    status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
    for name in ("", *(servicer.name for servicer in program.servicers)):
        await health.set(name, status)


async def _stop(
    server: grpc.aio.Server,
    health: HealthServicer,
    guard: Guard,
    link: LinkServicer,
    program: Program,
    settings: Settings,
) -> None:
    """Says NOT_SERVING, serves on until callers have let go, refuses what comes later, and ends what is under way."""
    log.event("stopping")
    started_s = time.monotonic()
    program.description.draining = True
    await health.enter_graceful_shutdown()
    link.announce()
    await asyncio.gather(asyncio.sleep(settings.drain_s), link.let_go(program.is_idle, settings.grace_s))
    left_s = started_s + settings.drain_s + settings.grace_s - time.monotonic()
    left_s = max(left_s, min(settings.grace_s, LAST_CALLS_S))
    guard.refuse()
    link.drain()
    await asyncio.gather(guard.ended(left_s), link.ended(left_s))
    await server.stop(REPLIES_S)


def main_guard(program: Callable[[list[str]], int]) -> None:
    """Runs a program's `main` with the process' arguments; settings that are bad end it with one line and status 2."""
    try:
        status = program(sys.argv[1:])
    except SetupError as error:
        print(f"error: {error}", file=sys.stderr)
        status = EXIT_SETUP_ERROR
    sys.exit(status)
