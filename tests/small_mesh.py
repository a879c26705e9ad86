"""A mesh of a small language model in one event loop: the programs' own servicers on sockets, and their gateway."""

from __future__ import annotations

import asyncio
import importlib
import typing
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import grpc.aio

from expertmesh.client import Client
from expertmesh.mesh_file import MeshFile, Service
from expertmesh.rpc.channel import SERVER_OPTIONS, message_limits
from expertmesh.rpc.guard import Guard
from expertmesh.rpc.interceptor import CallInterceptor
from expertmesh.rpc.link.servicer import LinkServicer
from expertmesh.rpc.server import Program, register
from expertmesh.rpc.settings import read_settings
from expertmesh.telemetry.tracing import OFF
from tests import tiny
from tests.generating import model

KINDS = ("tokenizer", "embedding", "gating", "expert", "classifier", "full_model")
Wrap = Callable[[Any], Any]


class Switch:
    """A program that is served, or is not.

    Args:
        program: The program; one with a lifespan is served once.
        address: Where.
        max_message_bytes: Largest message that it accepts.
    """

    def __init__(self, program: Program, address: str, max_message_bytes: int) -> None:
        self._serve = lambda: serving_program(program, address, max_message_bytes)
        self._stack = AsyncExitStack()

    async def on(self) -> None:
        """Serves it."""
        await self._stack.enter_async_context(self._serve())

    async def off(self) -> None:
        """Ends it at once, whatever is under way."""
        await self._stack.aclose()


@dataclass
class SmallMesh:
    """A running mesh.

    Attributes:
        address: Of its gateway.
        client: Of that.
        programs: What runs, by kind; experts by the names of their services.
        switches: What may be ended and started again, by the same names.
        file: Its mesh file.
    """

    address: str
    client: Client
    programs: dict[str, Program]
    switches: dict[str, Switch]
    file: Path

    @property
    def free_blocks(self) -> tuple[int, int]:
        """Blocks that nobody holds in gating, and how many there are."""
        leases = self.programs["gating"].servicers[0].implementation._leases
        return leases.free_blocks, leases._cache.blocks


@asynccontextmanager
async def small_mesh(
    folder: Path | None = None,
    wraps: dict[str, Wrap] | None = None,
    full_model: bool = True,
    max_message_bytes: int = 64 * 2**20,
    experts: tuple[str, ...] = ("*:*",),
    **gateway: object,
) -> AsyncIterator[SmallMesh]:
    """Runs a mesh.

    Args:
        folder: The split model.
        wraps: By kind or service, what stands in place of a program's first servicer.
        full_model: Whether there is one.
        max_message_bytes: Largest message that anybody accepts.
        experts: What each expert service holds; they are called expert, or expert-0, expert-1 and so on.
        gateway: Further settings of the gateway.
    """
    folder = folder or model()
    sockets = tiny.scratch()
    size = f"--max-message-bytes={max_message_bytes}"
    async with AsyncExitStack() as stack:
        programs: dict[str, Program] = {}
        services = []
        switches: dict[str, Switch] = {}
        for kind, name, held in _services(experts, full_model):
            own = [f"--experts={held}"] if held else []
            program = programs[name] = load_program(kind, f"--model={folder}", size, *own)
            wrap = (wraps or {}).get(name) or (wraps or {}).get(kind)
            first = program.servicers[0]
            if wrap:
                program.servicers[0] = replace(first, implementation=wrap(first.implementation))
            address = f"unix:{sockets}/{name}.sock"
            switch = switches[name] = Switch(
                replace(program, servicers=list(program.servicers)), address, max_message_bytes
            )
            await switch.on()
            stack.push_async_callback(switch.off)
            services.append(Service(name, kind, (address,), tuple(held.split(",")) if held else ()))
            program.servicers[0] = first
        MeshFile(str(folder), tuple(services)).write(sockets / "mesh.toml")
        options = [f"--{name.replace('_', '-')}={value}" for name, value in gateway.items()]
        program = programs["gateway"] = load_program(
            "gateway", f"--mesh={sockets / 'mesh.toml'}", "--http=", size, *options
        )
        address = f"unix:{sockets}/gateway.sock"
        await stack.enter_async_context(serving_program(program, address, 64 * 2**20))
        client = await stack.enter_async_context(Client(address))
        async with asyncio.timeout(30):
            while not program.is_ready():
                await asyncio.sleep(0.01)
        yield SmallMesh(address, client, programs, switches, sockets / "mesh.toml")


def _services(experts: Sequence[str], full_model: bool) -> Iterator[tuple[str, str, str]]:
    """(kind, name, experts) of every service."""
    for kind in KINDS if full_model else KINDS[:-1]:
        if kind != "expert":
            yield kind, kind, ""
            continue
        for number, held in enumerate(experts):
            yield kind, "expert" if len(experts) == 1 else f"expert-{number}", held


def load_program(kind: str, *arguments: str) -> Program:
    """Loads what a process of its own would."""
    module = importlib.import_module(f"services.{kind}.__main__")
    settings = typing.get_type_hints(module.load)["settings"]
    program: Program = module.load(read_settings(settings, kind, arguments, {}), OFF)
    return program


@asynccontextmanager
async def serving_program(
    program: Program, address: str, max_message_bytes: int = 64 * 2**20
) -> AsyncIterator[LinkServicer]:
    """Serves a program at an address; gives what announces that it drains."""
    guard = Guard()
    options = (*SERVER_OPTIONS, *message_limits(max_message_bytes))
    server = grpc.aio.server(interceptors=[CallInterceptor(guard)], options=options)
    link = LinkServicer(guard, max_message_bytes=max_message_bytes)
    register(server, program, guard, link)
    server.add_insecure_port(address)
    async with AsyncExitStack() as stack:
        if program.lifespan is not None:
            await stack.enter_async_context(program.lifespan)
        await stack.enter_async_context(link.listening(address))
        await server.start()
        stack.push_async_callback(server.stop, None)
        stack.push_async_callback(link.ended, 0)
        stack.callback(link.drain)
        yield link
