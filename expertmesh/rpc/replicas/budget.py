"""How many calls may be made beyond those that were asked for: a bucket of tokens that calls fill."""

from __future__ import annotations

from expertmesh.errors import MeshError, Overloaded, Unavailable

PER_CALL, MOST = 0.1, 16.0  # of calls that are repeated


class Budget:
    """A bucket of tokens; every call adds a part of one, and a call more takes one.

    Over any number of calls it gives at most `most + per_call * (calls + 1)`, however many of them fail.

    Args:
        per_call: What a call adds.
        most: It is full when it holds so many tokens.
        first: What it holds at the start.
    """

    def __init__(self, per_call: float, most: float, first: float) -> None:
        self._per_call, self._most = per_call, most
        self.tokens = first

    @property
    def is_half_full(self) -> bool:
        """Whether half of the tokens are there, or more."""
        return self.tokens >= self._most / 2

    def earn(self) -> None:
        """A call was asked for."""
        if self.tokens < self._most:  # without a call of `min`: this is done for every call
            self.tokens += self._per_call

    def take(self) -> bool:
        """Takes a token; whether there was one."""
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


def exhausted(service: str, error: MeshError) -> MeshError:
    """What a caller is told of a failure that would be worth another call, were there a token for it."""
    if isinstance(error, Overloaded):
        return error
    return Unavailable(f"too many calls to {service} had to be repeated lately; this one failed: {error}", service)
