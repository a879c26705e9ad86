"""An embedding that answers with its own number in every place, and says who it is when it is asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from expertmesh import wire
from expertmesh.v1.description_pb2 import DescribeResponse, Part
from expertmesh.v1.description_pb2_grpc import DescriptionServiceServicer, add_DescriptionServiceServicer_to_server
from expertmesh.v1.embedding_pb2 import EmbedResponse
from expertmesh.v1.embedding_pb2_grpc import EmbeddingServiceServicer, add_EmbeddingServiceServicer_to_server
from tests import tiny

DIGEST = bytes(range(32))


class Honest(EmbeddingServiceServicer, DescriptionServiceServicer):
    """What the doubles that misbehave are made from.

    Args:
        number: What its rows hold.
        kind: What it says it is.
        digest: The digest of the part it says it holds.
    """

    def __init__(self, number: float = 0.0, kind: str = "embedding", digest: bytes = DIGEST) -> None:
        self.number = number
        self.description = DescribeResponse(kind=kind, parts=[Part(name="embedding", digest=digest)])
        self.calls = 0
        self.arrived = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()

    async def Describe(self, request: Any, context: Any) -> DescribeResponse:
        return self.description

    async def Embed(self, request: Any, context: Any) -> Any:
        self.calls += 1
        self.arrived.set()
        await self.go_on.wait()
        return EmbedResponse(rows=wire.encode(np.full((1, 2), self.number, np.float32)))

    @asynccontextmanager
    async def served(self, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
        """Serves it without the product's interceptor."""
        registrations = [
            (add_EmbeddingServiceServicer_to_server, self),
            (add_DescriptionServiceServicer_to_server, self),
        ]
        async with tiny.served(*registrations, address=address, guarded=False) as taken:
            yield taken
