"""An embedding that raises what it is given."""

from __future__ import annotations

from typing import Any

from expertmesh.v1.embedding_pb2_grpc import EmbeddingServiceServicer


class Failing(EmbeddingServiceServicer):
    def __init__(self, error: BaseException) -> None:
        self._error = error

    async def Embed(self, request: Any, context: Any) -> Any:
        raise self._error
