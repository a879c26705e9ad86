"""Callers that classify in a closed loop: each sends its next text when the last one is answered."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from expertmesh.client import Client
from expertmesh.v1.inference_pb2 import (
    CONTRACT_EXACT,
    CONTRACT_MESH_ONLY,
    ROUTE_FULL_MODEL,
    ClassifyResponse,
    Route,
)


@dataclass(frozen=True)
class Round:
    """What one round gave.

    Attributes:
        texts_per_s: Texts whose answers came in the time that was asked for, by that time.
        p50_ms: Median time to the answer, of all answers.
        p99_ms: Of 99 of 100.
        tokens: Of all answers.
        seconds: Until the last answer came.
    """

    texts_per_s: float
    p50_ms: float
    p99_ms: float
    tokens: int
    seconds: float


async def closed_loop(
    address: str,
    route: Route,
    texts: Sequence[str],
    callers: int,
    seconds: float,
    lead_s: float = 0.0,
    call_texts: int = 1,
    observe: Callable[[ClassifyResponse], None] = lambda response: None,
) -> Round:
    """Asks one route.

    Args:
        address: Where.
        route: Which way.
        texts: What to classify, in turn.
        callers: How many ask at once.
        seconds: For how long.
        lead_s: For how long before that, so that what is counted begins with everything under way.
        call_texts: Texts of a call.
        observe: Is shown every answer.
    """
    latencies_s: list[float] = []
    tokens = counted = 0
    contract = CONTRACT_EXACT if route == ROUTE_FULL_MODEL else CONTRACT_MESH_ONLY
    started_s = time.perf_counter()

    async def caller(number: int, client: Client) -> None:
        nonlocal tokens, counted
        turn = number
        while time.perf_counter() - started_s < lead_s + seconds:
            sent_s = time.perf_counter()
            response = await client.classify(_some(texts, turn, call_texts), contract, route)
            answered_s = time.perf_counter()
            latencies_s.append(answered_s - sent_s)
            counted += call_texts * (lead_s <= answered_s - started_s < lead_s + seconds)
            observe(response)
            tokens += sum(result.tokens for result in response.results)
            turn += call_texts

    async with Client(address) as client:
        await asyncio.gather(*(caller(number, client) for number in range(callers)))
    took_s = time.perf_counter() - started_s
    latencies_s.sort()
    p99_s = latencies_s[min(len(latencies_s) - 1, int(0.99 * len(latencies_s)))]
    return Round(counted / seconds, statistics.median(latencies_s) * 1e3, p99_s * 1e3, tokens, took_s)


def _some(texts: Sequence[str], start: int, count: int) -> list[str]:
    return [texts[number % len(texts)] for number in range(start, start + count)]
