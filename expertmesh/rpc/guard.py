"""What stands around every call, however it came: timing, counting, and turning errors into statuses.

A caller never sees exception text: errors of our tree become their status, anything else INTERNAL with an id that
the log knows too.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from prometheus_client import Counter, Histogram

from expertmesh.errors import DeadlineExceeded, MeshError
from expertmesh.rpc import request_id
from expertmesh.rpc.errors import code_of, details_of, text_of
from expertmesh.telemetry import metrics
from expertmesh.telemetry.logging import event, is_logged

ResultT = TypeVar("ResultT")


@dataclass(frozen=True)
class Failure:
    """How a call ended that did not end well: its status, and `google.rpc.Status` with the details, serialised."""

    code: grpc.StatusCode
    text: str
    details: bytes = b""


class Aborted(Exception):
    """A method ended its call by itself, as `context.abort` does.

    Args:
        failure: How.
    """

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.text)
        self.failure = failure


class Guard:
    """Runs the calls of one program.

    Attributes:
        origin: Metadata of every reply, which says what process gave it.
        refuses: Whether calls that come by themselves are refused, since the program stops.
    """

    def __init__(self) -> None:
        self.origin: tuple[tuple[str, str], ...] = ()
        self._counted: dict[tuple[str, grpc.StatusCode], tuple[Histogram, Counter]] = {}
        self._own_under_way = 0
        self._one_ended = asyncio.Event()
        self.refuses = False

    def refuse(self) -> None:
        """Has calls refused that come by themselves; a link sees to its own."""
        self.refuses = True

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Counts a call that came by itself as under way."""
        self._own_under_way += 1
        try:
            yield
        finally:
            self._own_under_way -= 1
            self._one_ended.set()

    async def ended(self, timeout_s: float) -> None:
        """Waits until no call that came by itself is under way, or the time is over."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while self._own_under_way:
                    self._one_ended.clear()
                    await self._one_ended.wait()

    async def run(self, method: str, work: Awaitable[ResultT]) -> ResultT | Failure:
        """Awaits work; gives its result, or how it failed."""
        started_s = time.monotonic()
        try:
            result = await work
        except BaseException as error:
            return self._failed(method, error, started_s)
        self.count(method, grpc.StatusCode.OK, started_s)
        return result

    def outcome(self, method: str, result: Callable[[], ResultT], started_s: float) -> ResultT | Failure:
        """Gives the result of work that has ended, or how it failed.

        Args:
            method: What was called.
            result: Gives it, or raises what ended the work.
            started_s: When the call came, on the clock of `time.monotonic`.
        """
        try:
            given = result()
        except BaseException as error:
            return self._failed(method, error, started_s)
        self.count(method, grpc.StatusCode.OK, started_s)
        return given

    def _failed(self, method: str, error: BaseException, started_s: float) -> Failure:
        """The failure that an error is to the caller; what ends the work without being one is raised again."""
        if isinstance(error, grpc.aio.AbortError):
            self.count(method, grpc.StatusCode.ABORTED, started_s)
            raise error
        if not isinstance(error, Exception):
            self.count(method, grpc.StatusCode.CANCELLED, started_s)
            raise error
        failure = failure_of(method, error)
        self.count(method, failure.code, started_s)
        return failure

    def count(self, method: str, code: grpc.StatusCode, started_s: float) -> None:
        """Takes down a call that has ended."""
        took_s = time.monotonic() - started_s
        metrics.LEDGER.enter(self._post, method, code, took_s)
        if is_logged(logging.DEBUG):
            told: dict[str, Any] = {"method": method, "code": code.name, "seconds": took_s}
            event("call", level=logging.DEBUG, **told, request=request_id.current())

    def _post(self, method: str, code: grpc.StatusCode, took_s: float) -> None:
        counted = self._counted.get((method, code))
        if counted is None:
            counted = metrics.RPC_SECONDS.labels(method), metrics.RPCS.labels(method, code.name)
            self._counted[method, code] = counted
        seconds, calls = counted
        seconds.observe(took_s)
        calls.inc()


def failure_of(method: str, error: Exception) -> Failure:
    """The status of an exception; what does not belong on the wire gets an id in place of its text."""
    if isinstance(error, Aborted):
        return error.failure
    if isinstance(error, TimeoutError):
        error = DeadlineExceeded("the deadline has passed")
    if isinstance(error, MeshError) and (code := code_of(error)) is not grpc.StatusCode.INTERNAL:
        return Failure(code, text_of(error), details_of(error))
    error_id = secrets.token_hex(8)
    event("internal_error", level=logging.ERROR, exc_info=error, method=method, error_id=error_id)
    return Failure(grpc.StatusCode.INTERNAL, f"internal error {error_id}")
