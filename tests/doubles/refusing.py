"""An embedding that answers every call with a status."""

from __future__ import annotations

from typing import Any

import grpc

from tests.doubles.honest import Honest


class Refusing(Honest):
    def __init__(self, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE) -> None:
        super().__init__()
        self.code = code

    async def Embed(self, request: Any, context: Any) -> Any:
        self.calls += 1
        await context.abort(self.code, "not today")
