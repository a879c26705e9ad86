"""A deadline is a point in monotonic time; it is passed on, and what is left of it shrinks on the way."""

from __future__ import annotations

import time
from dataclasses import dataclass

import grpc.aio

from expertmesh.errors import DeadlineExceeded

HOP_MARGIN_S = 0.005
MAX_TIMEOUT_S = 3600.0


@dataclass(frozen=True, order=True)
class Deadline:
    """A point in time.

    Attributes:
        at_s: On the clock of `time.monotonic`.
    """

    at_s: float

    @classmethod
    def after(cls, timeout_s: float) -> Deadline:
        """The deadline `timeout_s` from now, at most `MAX_TIMEOUT_S`."""
        return cls(time.monotonic() + min(timeout_s, MAX_TIMEOUT_S))

    @classmethod
    def of_call(cls, context: grpc.aio.ServicerContext, default_s: float) -> Deadline:
        """The caller's deadline, or `default_s` from now if it set none."""
        remaining_s = context.time_remaining()
        return cls.after(default_s if remaining_s is None else remaining_s)

    def remaining_s(self) -> float:
        """What is left.

        Raises:
            DeadlineExceeded: Nothing is.
        """
        left_s = self.at_s - time.monotonic()
        if left_s <= 0:
            raise DeadlineExceeded("the deadline has passed")
        return left_s

    def next_hop_s(self) -> float:
        """The timeout for a call made on behalf of this one, a little less than what is left.

        Raises:
            DeadlineExceeded: There is not enough left for a hop.
        """
        left_s = self.remaining_s() - HOP_MARGIN_S
        if left_s <= 0:
            raise DeadlineExceeded("the deadline has passed")
        return left_s
