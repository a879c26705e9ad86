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
        is_alone: Whether no other call can have come meanwhile: none that would have to wait for it, and none that
            could share its work.
    """

    def __init__(self, timeout_us: int, is_alone: bool = False) -> None:
        self._ends_s = time.monotonic() + timeout_us / 1e6
        self.is_alone = is_alone

    def time_remaining(self) -> float:
        """Seconds that the caller still waits."""
        return max(0.0, self._ends_s - time.monotonic())

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """Ends the call with a status; of the metadata only the status' details travel."""
        raise Aborted(
            Failure(code, details, next((value for key, value in trailing_metadata if key == DETAILS_KEY), b""))
        )


def is_alone(context: object) -> bool:
    """Whether a call is known to have come alone; of one that did not come over a link that is not known."""
    return isinstance(context, LinkContext) and context.is_alone
