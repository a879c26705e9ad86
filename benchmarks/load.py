"""Callers that classify in a closed loop: each sends its next text when the last one is answered."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

from expertmesh.client import Client
from expertmesh.v1.inference_pb2 import CONTRACT_EXACT, CONTRACT_MESH_ONLY, ROUTE_FULL_MODEL, Route


@dataclass(frozen=True)
class Round:
    """What one round gave.

    Attributes:
        texts_per_s: Answers that came in the time that was asked for, by that time.
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
    address: str, route: Route, texts: Sequence[str], callers: int, seconds: float, lead_s: float = 0.0
) -> Round:
    """Asks one route; every text is a call of its own.

    Args:
        address: Where.
        route: Which way.
        texts: What to classify, in turn.
        callers: How many ask at once.
        seconds: For how long.
        lead_s: For how long before that, so that what is counted begins with everything under way.
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
            response = await client.classify([texts[turn % len(texts)]], contract, route)
            answered_s = time.perf_counter()
            latencies_s.append(answered_s - sent_s)
            counted += lead_s <= answered_s - started_s < lead_s + seconds
            tokens += response.results[0].tokens
            turn += 1

    async with Client(address) as client:
        await asyncio.gather(*(caller(number, client) for number in range(callers)))
    took_s = time.perf_counter() - started_s
    latencies_s.sort()
    p99_s = latencies_s[min(len(latencies_s) - 1, int(0.99 * len(latencies_s)))]
    return Round(counted / seconds, statistics.median(latencies_s) * 1e3, p99_s * 1e3, tokens, took_s)
