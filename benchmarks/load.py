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
    """What one round gave."""

    texts_per_s: float
    p50_ms: float
    p99_ms: float
    tokens: int
    seconds: float


async def closed_loop(address: str, route: Route, texts: Sequence[str], callers: int, seconds: float) -> Round:
    """Asks one route for so many seconds; every text is a call of its own."""
    latencies_s: list[float] = []
    tokens = 0
    contract = CONTRACT_EXACT if route == ROUTE_FULL_MODEL else CONTRACT_MESH_ONLY
    started_s = time.perf_counter()

    async def caller(number: int, client: Client) -> None:
        nonlocal tokens
        turn = number
        while time.perf_counter() - started_s < seconds:
            sent_s = time.perf_counter()
            response = await client.classify([texts[turn % len(texts)]], contract, route)
            latencies_s.append(time.perf_counter() - sent_s)
            tokens += response.results[0].tokens
            turn += 1

    async with Client(address) as client:
        await asyncio.gather(*(caller(number, client) for number in range(callers)))
    took_s = time.perf_counter() - started_s
    latencies_s.sort()
    p99_s = latencies_s[min(len(latencies_s) - 1, int(0.99 * len(latencies_s)))]
    rate = len(latencies_s) / took_s
    return Round(rate, statistics.median(latencies_s) * 1e3, p99_s * 1e3, tokens, took_s)
