"""What a method may ask of a call that came over a link."""

from __future__ import annotations

import time
from typing import Any, NoReturn

import grpc

from expertmesh.rpc.errors import DETAILS_KEY
from expertmesh.rpc.guard import Aborted, Failure


class LinkContext:
    """The part of a gRPC servicer's context that methods use.

    Args:
        timeout_us: How long the caller waits.
    """

    def __init__(self, timeout_us: int) -> None:
        self._ends_s = time.monotonic() + timeout_us / 1e6

    def time_remaining(self) -> float:
        """Seconds that the caller still waits."""
        return max(0.0, self._ends_s - time.monotonic())

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """Ends the call with a status; of the metadata only the status' details travel."""
        raise Aborted(
            Failure(code, details, next((value for key, value in trailing_metadata if key == DETAILS_KEY), b""))
        )
