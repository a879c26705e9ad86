"""Processes that hang are lost within two seconds, those that compute are not, and one that is killed loses no call."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from time import monotonic

import pytest

from tests import tiny
from tests.doubles.sleepy import running
from tests.replica_sets import ask, replica_set

FOUND_S = 2.0
BUSY_MS = 4000


def free_address(carrier: str) -> str:
    if carrier == "unix":
        return f"unix:{tiny.scratch()}/sleepy.sock"
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{one.getsockname()[1]}"


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, int]]:
    """Addresses and ids of processes: two neighbours, two by TCP, and the last one, which a test may kill."""
    addresses = [free_address(carrier) for carrier in ("unix", "unix", "tcp", "tcp", "unix")]
    with running(*addresses) as pids:
        yield dict(zip(addresses, pids, strict=True))


@pytest.mark.parametrize("carrier", ["unix", "tcp"])
async def test_a_hung_process_is_lost_within_two_seconds_and_is_back_when_it_goes_on(
    carrier: str, processes: dict[str, int]
) -> None:
    first, second = [address for address in processes if address.startswith("unix") == (carrier == "unix")][:2]
    hung, both = processes[first], {processes[first], processes[second]}
    async with replica_set(first, second) as (replicas, events):
        assert {await ask(replicas) for _ in range(2)} == both
        started = [asyncio.create_task(ask(replicas)) for _ in range(6)]
        os.kill(hung, signal.SIGSTOP)
        stopped_s = monotonic()
        try:
            answers = await asyncio.gather(*started, *(ask(replicas) for _ in range(6)))
            await events.until(lambda: events.count("lost", first) > 0)
            assert monotonic() - stopped_s < FOUND_S
        finally:
            os.kill(hung, signal.SIGCONT)
        assert set(answers) <= both
        await events.until(lambda: events.count("live", first) == 2)
        assert {await ask(replicas) for _ in range(2)} == both


async def test_a_busy_process_is_not_lost(processes: dict[str, int]) -> None:
    addresses = list(processes)[1:3]  # a neighbour, and one by TCP
    async with replica_set(*addresses) as (replicas, events):
        busy = await asyncio.gather(*(ask(replicas, milliseconds=BUSY_MS) for _ in addresses))
    assert set(busy) == {processes[address] for address in addresses}
    assert [event.what for event in events.seen] == ["live", "live"]


async def test_64_calls_under_way_survive_a_killed_process(processes: dict[str, int]) -> None:
    other, doomed = next(iter(processes)), list(processes)[-1]
    async with replica_set(other, doomed) as (replicas, events):
        started = [asyncio.create_task(ask(replicas, milliseconds=20)) for _ in range(128)]
        while min(replica.calls_under_way for replica in replicas.replicas) < 64:
            await asyncio.sleep(0)
        os.kill(processes[doomed], signal.SIGKILL)
        answers = Counter(await asyncio.gather(*started))
        assert answers[processes[other]] > 100
        assert answers.keys() <= {processes[other], processes[doomed]}
        assert events.count("lost", doomed) == 1
        assert events.count("retried", other) == answers[processes[other]] - 64
