"""A mesh of a small language model in one event loop: the programs' own servicers on sockets, and their gateway."""

from __future__ import annotations

import asyncio
import importlib
import typing
from collections.abc import AsyncIterator, Callable
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


@dataclass
class SmallMesh:
    """A running mesh.

    Attributes:
        address: Of its gateway.
        client: Of that.
        programs: What runs, by kind.
        file: Its mesh file.
    """

    address: str
    client: Client
    programs: dict[str, Program]
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
    **gateway: object,
) -> AsyncIterator[SmallMesh]:
    """Runs a mesh.

    Args:
        folder: The split model.
        wraps: By kind, what stands in place of a program's first servicer.
        full_model: Whether there is one.
        max_message_bytes: Largest message that anybody accepts.
        gateway: Further settings of the gateway.
    """
    folder = folder or model()
    sockets = tiny.scratch()
    size = f"--max-message-bytes={max_message_bytes}"
    async with AsyncExitStack() as stack:
        programs: dict[str, Program] = {}
        services = []
        for kind in KINDS if full_model else KINDS[:-1]:
            own = ["--experts=*:*"] if kind == "expert" else []
            program = programs[kind] = load_program(kind, f"--model={folder}", size, *own)
            if wraps and kind in wraps:
                first = program.servicers[0]
                program.servicers[0] = replace(first, implementation=wraps[kind](first.implementation))
            address = f"unix:{sockets}/{kind}.sock"
            await stack.enter_async_context(serving_program(program, address, max_message_bytes))
            services.append(Service(kind, kind, (address,), ("*:*",) if kind == "expert" else ()))
            if wraps and kind in wraps:
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
        yield SmallMesh(address, client, programs, sockets / "mesh.toml")


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
        stack.callback(link.drain)
        yield link
