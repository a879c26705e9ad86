"""A process that offers links and can be told to drain, and replica sets that know a few of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import grpc.aio

from expertmesh import wire
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.guard import Guard
from expertmesh.rpc.interceptor import CallInterceptor
from expertmesh.rpc.link.servicer import LinkServicer
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas.admission import require_parts
from expertmesh.rpc.replicas.replica import ReplicaEvent
from expertmesh.rpc.replicas.replica_set import ReplicaSet
from expertmesh.rpc.replicas.resolver import Names
from expertmesh.rpc.server import Program, Servicer, register
from expertmesh.v1.embedding_pb2 import EmbedRequest, EmbedResponse
from expertmesh.v1.embedding_pb2_grpc import EmbeddingServiceStub, add_EmbeddingServiceServicer_to_server
from tests.doubles.honest import DIGEST, Honest

WAIT_S = 10.0


class Embedder(Honest):
    """Answers with its number, over links too.

    Args:
        number: What its rows hold.
        digest: The digest of the part it says it holds.
    """

    def __init__(self, number: float, digest: bytes = DIGEST) -> None:
        super().__init__(number, digest=digest)
        self.link = LinkServicer(Guard())
        self.address = ""

    def announce(self) -> None:
        """Says that it will stop."""
        self.link.announce()

    @asynccontextmanager
    async def running(self, address: str = "127.0.0.1:0") -> AsyncIterator[Embedder]:
        """Serves it as a program is served; at the end links are over as those of a killed process."""
        guard = Guard()
        server = grpc.aio.server(interceptors=[CallInterceptor(guard)], options=(("grpc.so_reuseport", 0),))
        servicer = Servicer("expertmesh.v1.EmbeddingService", add_EmbeddingServiceServicer_to_server, self)
        self.link = LinkServicer(guard)
        register(server, Program([servicer], self.description), guard, self.link)
        port = server.add_insecure_port(address)
        self.address = address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
        async with self.link.listening(address):
            await server.start()
            try:
                yield self
            finally:
                self.link.drain()
                await self.link.ended(0)
                await server.stop(None)


class Events:
    """Everything a replica set told, and a way to wait for it."""

    def __init__(self) -> None:
        self.seen: list[ReplicaEvent] = []
        self._news = asyncio.Event()

    def __call__(self, event: ReplicaEvent) -> None:
        self.seen.append(event)
        self._news.set()

    def count(self, what: str, address: str | None = None) -> int:
        return sum(event.what == what and address in (None, event.address) for event in self.seen)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(WAIT_S):
            while not holds():
                self._news.clear()
                await self._news.wait()


@asynccontextmanager
async def known(
    *addresses: str, look_up: Callable[[str, int], Awaitable[Sequence[str]]] | None = None, live: int | None = None
) -> AsyncIterator[tuple[ReplicaSet, Events]]:
    """A set whose replicas have been met: as many are live as `live` says, all by default."""
    events = Events()
    admit = partial(require_parts, kind="embedding", model_digest="", parts={"embedding": DIGEST})
    names = Names if look_up is None else partial(Names, every_s=0.1, look_up=look_up)
    replicas = ReplicaSet("embedding", addresses, open_channel, EmbeddingServiceStub, admit, events, names=names)
    async with replicas:
        await events.until(lambda: len(replicas.live) == (len(addresses) if live is None else live))
        yield replicas, events


def ask(replicas: ReplicaSet, timeout_s: float = WAIT_S) -> Any:
    """One call; gives the number of whoever answered."""

    def read_number(reply: EmbedResponse, origin: Origin) -> float:
        return float(wire.decode_finite(reply.rows, (1, 2), "rows")[0, 0])

    return replicas.call("Embed", EmbedRequest(), Deadline.after(timeout_s), read_number)
