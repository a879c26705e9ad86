"""Processes that are stopped in order: what they have under way ends, or goes on elsewhere, with the very tokens."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from expertmesh.client import Client
from expertmesh.errors import Unavailable
from expertmesh.v1 import inference_pb2 as pb
from tests.generating import Answer, answer_of, asked, by_route, metrics_of, model, until
from tests.up import Up, exists, wait_until

REQUESTS = [
    asked(length, 200, temperature=1.0, seed=length, contract=pb.CONTRACT_MESH_ONLY) for length in (3, 40, 90, 200)
]


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with Up(model(), "--expert-services", "1", "--replicas", "gating=2", "--no-restart") as running:
        yield running


@pytest.fixture(scope="module")
def expected(up: Up) -> list[Answer]:
    async def ask() -> list[Answer]:
        async with Client(up.grpc) as client:
            requests = [by_route(request, pb.ROUTE_FULL_MODEL) for request in REQUESTS]
            for request in requests:
                request.contract = pb.CONTRACT_EXACT
            return [answer_of([message async for message in client.generate(one)]) for one in requests]

    return asyncio.run(ask())


class Streams:
    """Streams of all requests through one client; each has given a few tokens once this is entered."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.messages: list[list[pb.GenerateResponse]] = [[] for _ in REQUESTS]

    async def __aenter__(self) -> Streams:
        self.tasks = [asyncio.create_task(self._read(number)) for number in range(len(REQUESTS))]
        async with asyncio.timeout(60):
            while not all(len(given) >= 10 for given in self.messages):
                await asyncio.sleep(0)
                assert not any(task.done() for task in self.tasks)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*self.tasks, return_exceptions=True)

    async def answers(self) -> list[Answer]:
        await asyncio.gather(*self.tasks)
        return [answer_of(given) for given in self.messages]

    async def _read(self, number: int) -> None:
        async with aclosing(self._client.generate(REQUESTS[number])) as messages:
            async for message in messages:
                self.messages[number].append(message)


def stop(up: Up, name: str) -> int:
    """SIGTERM; gives the process' id."""
    pid = up.pid(name)
    os.kill(pid, signal.SIGTERM)
    return pid


async def events(up: Up, what: str) -> float:
    numbers = await metrics_of(up, "gateway.0")
    return sum(number for name, number in numbers.items() if "replica_events_total" in name and f'="{what}"' in name)


async def test_a_home_that_is_stopped_hands_its_sequences_over(up: Up, expected: list[Answer]) -> None:
    async with Client(up.grpc) as client, Streams(client) as streams:
        pid = stop(up, "gating.0")
        await until(lambda: drains(up))
        await asyncio.to_thread(wait_until, lambda: not exists(pid), 15)
        assert not all(task.done() for task in streams.tasks)  # it did not wait for their ends
        assert await streams.answers() == expected
    numbers = await metrics_of(up, "gateway.0")
    assert numbers["expertmesh_rebuilds_total"] >= 1
    assert numbers["expertmesh_rebuilds_total"] <= len(REQUESTS)
    assert await events(up, "retried") == 0


async def drains(up: Up) -> bool:
    return await events(up, "draining") >= 1


async def test_the_only_home_goes_on_with_what_it_has_while_it_drains(up: Up) -> None:
    request = asked(5, 40, contract=pb.CONTRACT_MESH_ONLY)
    async with Client(up.grpc) as client:
        whole = answer_of([message async for message in client.generate(request)])
        async with aclosing(client.generate(request)) as messages:
            given = [await anext(messages)]
            pid = stop(up, "gating.1")
            given += [message async for message in messages]
        assert answer_of(given) == whole
        await asyncio.to_thread(wait_until, lambda: not exists(pid), 15)
        with pytest.raises(Unavailable, match="gating"):
            await client.complete(request)


async def is_refused(client: Client) -> bool:
    try:
        await client.complete(asked(3, 1))
    except Unavailable:
        return True
    return False


async def test_a_gateway_that_is_stopped_ends_what_it_has_and_refuses_the_rest() -> None:
    with Up(model(), "--expert-services", "1", "--no-restart", environment={"EXPERTMESH_GRACE_S": "60"}) as up:
        async with Client(up.grpc) as client, Client(up.grpc) as other:
            request = asked(5, 150, contract=pb.CONTRACT_MESH_ONLY)
            whole = answer_of([message async for message in client.generate(request)])
            await other.complete(asked(3, 1))  # its connection is there
            async with aclosing(client.generate(request)) as messages:
                given = [await anext(messages)]
                pid = stop(up, "gateway.0")
                await until(lambda: is_refused(other))
                assert exists(pid)
                given += [message async for message in messages]
            assert answer_of(given) == whole
            await asyncio.to_thread(wait_until, lambda: not exists(pid), 15)
