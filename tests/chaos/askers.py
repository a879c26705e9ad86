"""Who asks: a caller of one gateway by bare gRPC, or a client that was given every gateway."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Protocol

import grpc
import grpc.aio

from expertmesh.client import Client
from expertmesh.errors import MeshError, Unavailable
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.errors import code_of, error_info
from expertmesh.v1.inference_pb2 import ClassifyRequest, ClassifyResponse, GenerateRequest, GenerateResponse
from expertmesh.v1.inference_pb2_grpc import InferenceServiceStub


class Failed(Exception):
    """A request that ended with another status than OK.

    Args:
        code: Its name.
        reason: ErrorInfo and text.
    """

    def __init__(self, code: str, reason: dict[str, str]) -> None:
        super().__init__(code)
        self.code, self.reason = code, reason


class Asker(Protocol):
    """Sends requests; raises Failed where one fails."""

    async def classify(self, request: ClassifyRequest) -> ClassifyResponse:
        """One call."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateResponse]:
        """One stream."""

    async def close(self) -> None:
        """Ends connections."""


class BareAsker:
    """Asks one gateway and takes what comes.

    Args:
        address: Its gRPC address.
        timeout_s: Deadline of every request.
    """

    def __init__(self, address: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._channel = open_channel(address)
        self._stub = InferenceServiceStub(self._channel)

    async def classify(self, request: ClassifyRequest) -> ClassifyResponse:
        """One call."""
        try:
            reply: ClassifyResponse = _parsed(await self._stub.Classify(request, timeout=self._timeout_s))
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None
        return reply

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateResponse]:
        """One stream."""
        call = self._stub.Generate(request, timeout=self._timeout_s)
        try:
            async for message in call:
                yield _parsed(message)
        except grpc.aio.AioRpcError as error:
            raise _failed(error) from None
        finally:
            call.cancel()

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()


class ClientAsker:
    """Asks as a program does that uses `Client`.

    Args:
        addresses: Of all gateways.
        timeout_s: Deadline of every request.
    """

    def __init__(self, addresses: Sequence[str], timeout_s: float) -> None:
        self._client = Client(",".join(addresses), timeout_s)

    async def classify(self, request: ClassifyRequest) -> ClassifyResponse:
        """One call."""
        try:
            return await self._client.classify(list(request.texts), request.contract, request.route)
        except MeshError as error:
            raise _failed_here(error) from None

    async def generate(self, request: GenerateRequest) -> AsyncIterator[GenerateResponse]:
        """One stream."""
        try:
            async with aclosing(self._client.generate(request)) as messages:
                async for message in messages:
                    yield message
        except MeshError as error:
            raise _failed_here(error) from None

    async def close(self) -> None:
        """Ends connections."""
        await self._client.__aexit__(None, None, None)


def _parsed(message: Any) -> Any:
    if message is None:  # what gRPC gives, with status OK, for bytes that cannot be parsed
        raise Failed("UNPARSED", {"text": "the reply cannot be parsed"})
    return message


def _failed(error: grpc.aio.AioRpcError) -> Failed:
    return Failed(error.code().name, {"text": error.details() or "", **error_info(error)})


def _failed_here(error: MeshError) -> Failed:
    reason = {"text": str(error)}
    if isinstance(error, Unavailable):
        places = {"stage": error.stage, "layer": error.layer, "expert": error.expert}
        reason |= {name: str(value) for name, value in places.items() if value is not None}
    return Failed(code_of(error).name, reason)
