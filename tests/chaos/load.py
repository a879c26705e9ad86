"""Constant open-loop load: requests are sent when the clock says so, however many have not been answered."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.inference_pb2 import ClassifyRequest, GenerateRequest
from tests.chaos.askers import Asker, BareAsker, ClientAsker, Failed
from tests.chaos.record import NEVER, OK, Record
from tests.chaos.samples import Samples, classified_bits, token_bits

GIVE_UP_S = 3.0  # after a deadline; what has not ended by then never will


@dataclass(frozen=True)
class Rate:
    """How fast to ask, and what.

    Attributes:
        per_s: Requests a second.
        timeout_s: Their deadline.
        contracts: Name of a contract to how often it comes among the others.
        by_client: Whether whoever asks uses a `Client` with all gateways; else each request goes to one, in turn.
    """

    per_s: float
    timeout_s: float = 10.0
    contracts: tuple[tuple[str, int], ...] = (("EXACT", 1),)
    by_client: bool = False


class Load:
    """Asks until it is told to stop; every request leaves one record.

    Args:
        samples: What to ask, drawn at random.
        gateways: Tells whom, in turn; each has a channel of its own.
        rate: How fast.
        number: Of this load; what is drawn depends on it alone.

    Attributes:
        is_paused: While this is set, nothing is sent.
        sent: How many requests, numbered from 0.
        records: Of those that have ended, in the order of their ends.
    """

    def __init__(self, samples: Samples, gateways: Callable[[], Sequence[str]], rate: Rate, number: int = 0) -> None:
        self._samples, self._gateways, self._rate, self._number = samples, gateways, rate, number
        self._drawn = random.Random(number)
        self._askers: dict[str, Asker] = {}
        self._answers: set[_Answer] = set()
        self.is_paused = False
        self._contracts = [name for name, share in rate.contracts for _ in range(share)]
        self._stop = asyncio.Event()
        self._under_way: set[asyncio.Task[None]] = set()
        self.sent = 0
        self.records: list[Record] = []

    async def __aenter__(self) -> Load:
        self._clock = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def stop(self) -> None:
        """Sends nothing more and waits for what is under way, until well after its deadline."""
        self._stop.set()
        await self._clock
        if self._under_way:
            await asyncio.wait(self._under_way, timeout=self._rate.timeout_s + 2 * GIVE_UP_S)
        for task in self._under_way:
            task.cancel()
        await asyncio.gather(*self._under_way, return_exceptions=True)
        for asker in self._askers.values():
            await asker.close()

    async def at_least(self, ended: int) -> None:
        """Waits until so many more requests have ended."""
        goal = len(self.records) + ended
        while len(self.records) < goal:
            await asyncio.sleep(0.01)

    @property
    def under_way(self) -> int:
        """Requests that have not ended."""
        return len(self._answers)

    @property
    def streaming(self) -> int:
        """Streams that have begun to answer and have not ended."""
        return sum(answer.has_begun for answer in self._answers)

    def burst(self, requests: int) -> None:
        """Sends so many at once, beside what the clock says; samples that are not for steady load, in turn."""
        every, steady = len(self._samples.requests), self._samples.steady
        bursting = range(steady, every) if steady < every else range(every)
        for number in range(requests):
            self._send(time.monotonic(), bursting[number % len(bursting)])

    async def _run(self) -> None:
        started_s = time.monotonic()
        for number in count():
            due_s = started_s + number / self._rate.per_s
            wait_s = due_s - time.monotonic()
            if wait_s > 0:
                try:
                    async with asyncio.timeout(wait_s):
                        await self._stop.wait()
                except TimeoutError:
                    pass
            if self._stop.is_set():
                return
            if not self.is_paused:
                self._send(due_s, self._drawn.randrange(self._samples.steady))

    def _send(self, due_s: float, sample: int) -> None:
        number = self.sent
        self.sent += 1
        gateways = self._gateways()
        gateway = ",".join(gateways) if self._rate.by_client else gateways[number % len(gateways)]
        asked = _Asked(
            number,
            sample,
            self._drawn.choice(self._contracts),
            gateway,
            due_s,
        )
        task = asyncio.create_task(self._ask(asked))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _ask(self, asked: _Asked) -> None:
        """One request to its end; whatever happens, it is recorded."""
        timeout_s, kind = self._rate.timeout_s, self._samples.kind
        start_s = time.monotonic()
        record = Record(
            self._number, asked.number, kind, asked.sample, asked.contract, asked.gateway,
            asked.due_s, start_s, start_s, timeout_s, NEVER,
        )  # fmt: skip
        answer = _Answer(start_s)
        self._answers.add(answer)
        ask = self._classify if kind == "classify" else self._generate
        reason: dict[str, str] = {}
        code = NEVER
        try:
            async with asyncio.timeout(timeout_s + GIVE_UP_S):
                await ask(asked, answer)
            code = OK
        except Failed as failed:
            code, reason = failed.code, failed.reason
        except asyncio.CancelledError:  # as which gRPC gives a status CANCELLED, too
            task = asyncio.current_task()
            code = NEVER if task is None or task.cancelling() else "CANCELLED"
        except TimeoutError:
            code = NEVER
        finally:
            self._answers.discard(answer)
            self.records.append(
                replace(record, end_s=time.monotonic(), code=code, reason=reason, **answer.fields(kind))
            )

    def _asker(self, gateway: str) -> Asker:
        if gateway not in self._askers:
            timeout_s = self._rate.timeout_s
            by_client = self._rate.by_client
            self._askers[gateway] = (
                ClientAsker(gateway.split(","), timeout_s) if by_client else BareAsker(gateway, timeout_s)
            )
        return self._askers[gateway]

    async def _classify(self, asked: _Asked, answer: _Answer) -> None:
        request = ClassifyRequest(contract=f"CONTRACT_{asked.contract}")
        request.MergeFrom(self._samples.requests[asked.sample])  # type: ignore[arg-type]
        answer.classified(await self._asker(asked.gateway).classify(request))

    async def _generate(self, asked: _Asked, answer: _Answer) -> None:
        request = GenerateRequest(contract=f"CONTRACT_{asked.contract}")
        request.MergeFrom(self._samples.requests[asked.sample])  # type: ignore[arg-type]
        async for message in self._asker(asked.gateway).generate(request):
            answer.streamed(message)


@dataclass(frozen=True)
class _Asked:
    number: int
    sample: int
    contract: str
    gateway: str
    due_s: float


class _Answer:
    """What has come of an answer so far."""

    def __init__(self, start_s: float) -> None:
        self._start_s = self._last_s = start_s
        self._first_s = self._stall_s = self._stall_at_s = 0.0
        self._routes: list[str] = []
        self._exact = True
        self._bits: list[bytes] = []
        self._finishes = self._messages = 0

    @property
    def has_begun(self) -> bool:
        return self._messages > 0

    def classified(self, reply: pb.ClassifyResponse) -> None:
        self._arrived()
        for result in reply.results:
            self._served(result.route, result.exact)
        self._bits.append(classified_bits(reply))
        self._finishes += 1

    def streamed(self, message: pb.GenerateResponse) -> None:
        self._arrived()
        self._served(message.route, message.exact)
        self._bits.append(token_bits(message))
        self._finishes += message.finish_reason != pb.FINISH_REASON_UNSPECIFIED

    def fields(self, kind: str) -> dict[str, Any]:
        """For a record."""
        return {
            "routes": tuple(self._routes),
            "exact": self._exact and self._messages > 0,
            "answer": b"".join(self._bits),
            "finishes": self._finishes,
            "messages": self._messages,
            "first_s": self._first_s,
            "stall_s": self._stall_s,
            "stall_at_s": self._stall_at_s,
        }

    def _arrived(self) -> None:
        now_s = time.monotonic()
        if not self._messages:
            self._first_s = now_s - self._start_s
        elif now_s - self._last_s > self._stall_s:
            self._stall_s, self._stall_at_s = now_s - self._last_s, self._last_s
        self._messages += 1
        self._last_s = now_s

    def _served(self, route: pb.Route, exact: bool) -> None:
        name = pb.Route.Name(route).removeprefix("ROUTE_")
        if name not in self._routes:
            self._routes.append(name)
        self._exact = self._exact and exact
