"""Replica sets of embeddings that are met before a test begins, and everything they tell."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import numpy as np

from expertmesh import wire
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas.admission import require_parts
from expertmesh.rpc.replicas.replica_set import ReplicaSet
from expertmesh.v1.embedding_pb2 import EmbedRequest, EmbedResponse
from expertmesh.v1.embedding_pb2_grpc import EmbeddingServiceStub
from tests.doubles.embedder import Events
from tests.doubles.honest import DIGEST, Honest

WAIT_S = 10.0
PARTS = {"embedding": DIGEST}


def read_number(reply: EmbedResponse, origin: Origin) -> float:
    return float(wire.decode_finite(reply.rows, (1, 2), "rows")[0, 0])


@asynccontextmanager
async def replica_set(*addresses: str, live: int | None = None) -> AsyncIterator[tuple[ReplicaSet, Events]]:
    """A set whose replicas have been met: as many are live as `live` says, all by default."""
    events = Events()
    wanted = len(addresses) if live is None else live
    admit = partial(require_parts, kind="embedding", model_digest="", parts=PARTS)
    async with ReplicaSet("embedding", addresses, open_channel, EmbeddingServiceStub, admit, events) as replicas:
        await events.until(lambda: len(replicas.live) == wanted)
        yield replicas, events


@asynccontextmanager
async def served(*doubles: Honest) -> AsyncIterator[list[str]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(double.served()) for double in doubles]


def ask(replicas: ReplicaSet, timeout_s: float = WAIT_S, milliseconds: int = 0) -> Any:
    """One call; a `Sleepy` replica blocks for so long."""
    request = EmbedRequest(ids=wire.encode(np.array([milliseconds], np.int32)))
    return replicas.call("Embed", request, Deadline.after(timeout_s), read_number)
