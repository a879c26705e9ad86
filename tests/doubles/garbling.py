"""An embedding whose replies are no protobuf; if it is told so, what it says of itself is none either."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from expertmesh.v1.description_pb2_grpc import add_DescriptionServiceServicer_to_server
from tests import tiny
from tests.doubles.honest import Honest

GARBAGE = b"\xff\xff\xff"


class Garbling(Honest):
    def __init__(self, describes: bool = True) -> None:
        super().__init__()
        self.describes = describes

    async def Embed(self, request: Any, context: Any) -> Any:
        self.calls += 1
        return GARBAGE

    async def garble(self, request: Any, context: Any) -> bytes:
        return GARBAGE

    @asynccontextmanager
    async def served(self, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
        registrations = [(_add("expertmesh.v1.EmbeddingService", "Embed", self.Embed), self)]
        if self.describes:
            registrations.append((add_DescriptionServiceServicer_to_server, self))
        else:
            registrations.append((_add("expertmesh.v1.DescriptionService", "Describe", self.garble), self))
        async with tiny.served(*registrations, address=address, guarded=False) as taken:
            yield taken


def _add(service: str, method: str, answer: Any) -> Any:
    def add(implementation: Any, server: grpc.aio.Server) -> None:
        handlers = {method: grpc.unary_unary_rpc_method_handler(answer)}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))

    return add
