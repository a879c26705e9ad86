from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing

import pytest

from expertmesh.client import Client
from expertmesh.errors import Unavailable
from expertmesh.v1 import inference_pb2 as pb
from tests.generating import Answer, answer_of, asked, by_route, metrics_of, model, streamed, until, used_blocks
from tests.up import Up

LENGTH = 250
REQUESTS = [
    asked(length, LENGTH, **settings)
    for length, settings in (
        (3, {}),
        (40, {"temperature": 1.2, "seed": 4, "logprobs": 2}),
        (200, {"temperature": 1.0, "seed": 5, "top_p": 0.9, "repetition_penalty": 1.2}),
        (130, {"temperature": 1.1, "seed": 6, "n": 2}),
        (20, {"min_p": 0.01, "temperature": 1.0, "seed": 7}),
        (64, {"stop": ["never to be seen"]}),
    )
]


@pytest.fixture(scope="module")
def two_homes() -> Iterator[Up]:
    with Up(model(), "--expert-services", "1", "--replicas", "gating=2", "--no-restart") as up:
        yield up
        up.end_replacements()


@pytest.fixture(scope="module")
def two_groups() -> Iterator[Up]:
    with Up(model(), "--expert-services", "2", "--no-restart") as up:
        yield up
        up.end_replacements()


@pytest.fixture(scope="module")
def expected(two_homes: Up) -> list[list[Answer]]:
    """What nobody has disturbed; by the full model, which is not needed for it later."""

    async def ask() -> list[list[Answer]]:
        async with Client(two_homes.grpc) as client:
            requests = [by_route(request, pb.ROUTE_FULL_MODEL) for request in REQUESTS]
            return [both(await streamed(client, request), request) for request in requests]

    return asyncio.run(ask())


def both(messages: list[pb.GenerateResponse], request: pb.GenerateRequest) -> list[Answer]:
    """The answers of all choices."""
    return [answer_of(messages, choice) for choice in range(request.n or 1)]


def under(contract: pb.Contract, request: pb.GenerateRequest) -> pb.GenerateRequest:
    changed = pb.GenerateRequest()
    changed.CopyFrom(request)
    changed.contract = contract
    return changed


class Streams:
    """Streams of all requests, under way in the background; each has given a few tokens once this is entered.

    Args:
        up: The mesh.
        contract: Of every request.
        route: Of every request.
    """

    def __init__(
        self, up: Up, contract: pb.Contract = pb.CONTRACT_EXACT, route: pb.Route = pb.ROUTE_UNSPECIFIED
    ) -> None:
        self._client = Client(up.grpc)
        self._requests = [by_route(under(contract, request), route) for request in REQUESTS]
        self.messages: list[list[pb.GenerateResponse]] = [[] for _ in REQUESTS]

    async def __aenter__(self) -> Streams:
        self._tasks = [asyncio.create_task(self._read(number)) for number in range(len(REQUESTS))]
        async with asyncio.timeout(60):
            while not all(len(given) >= 10 for given in self.messages):
                await asyncio.sleep(0)
                assert not any(task.done() for task in self._tasks)
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.__aexit__(None, None, None)

    async def ends(self) -> list[object]:
        """What becomes of each: its answers, or its error."""
        ends = await asyncio.gather(*self._tasks, return_exceptions=True)
        return [end or both(given, one) for end, given, one in zip(ends, self.messages, REQUESTS, strict=True)]

    def routes(self) -> list[list[int]]:
        """Of each stream the routes in the order in which they came."""
        return [list(dict.fromkeys(message.route for message in given)) for given in self.messages]

    async def _read(self, number: int) -> None:
        async with aclosing(self._client.generate(self._requests[number])) as messages:
            async for message in messages:
                self.messages[number].append(message)


async def test_streams_of_a_home_that_is_killed_go_on_at_the_other(two_homes: Up, expected: list[list[Answer]]) -> None:
    async with Streams(two_homes, pb.CONTRACT_MESH_ONLY) as streams:
        assert await used_blocks(two_homes, "gating.0") > 0
        assert await used_blocks(two_homes, "gating.1") > 0
        await asyncio.to_thread(two_homes.kill, "gating.0")
        assert await streams.ends() == expected
    assert (await metrics_of(two_homes, "gateway.0"))["expertmesh_rebuilds_total"] > 0
    assert await used_blocks(two_homes, "gating.1") == 0


async def test_a_home_that_comes_back_takes_sequences_again(two_homes: Up, expected: list[list[Answer]]) -> None:
    two_homes.start_again("gating.0")

    async def is_live() -> bool:
        return (await metrics_of(two_homes, "gateway.0"))['expertmesh_replicas_live{service="gating"}'] == 2

    await until(is_live)
    before = (await metrics_of(two_homes, "gateway.0"))["expertmesh_rebuilds_total"]
    async with Streams(two_homes, pb.CONTRACT_MESH_ONLY) as streams:
        await asyncio.to_thread(two_homes.end_replacements)  # an orderly end this time
        two_homes.replacements = []
        assert await streams.ends() == expected
    assert (await metrics_of(two_homes, "gateway.0"))["expertmesh_rebuilds_total"] > before  # it had some


async def test_without_any_home_the_full_model_goes_on_if_it_may(two_homes: Up, expected: list[list[Answer]]) -> None:
    async with Streams(two_homes) as streams, Streams(two_homes, pb.CONTRACT_MESH_ONLY) as strict:
        await asyncio.to_thread(two_homes.kill, "gating.1")
        assert await streams.ends() == expected
        for error in await strict.ends():
            assert isinstance(error, Unavailable)
            assert error.stage == "gating"
    assert streams.routes() == [[pb.ROUTE_MESH, pb.ROUTE_FULL_MODEL]] * len(REQUESTS)
    assert all(message.exact for given in streams.messages for message in given)
    numbers = await metrics_of(two_homes, "gateway.0")
    assert numbers['expertmesh_fallbacks_total{stage="gating"}'] >= len(REQUESTS)
    async with Client(two_homes.grpc) as client:  # as many stop ids as there may be, and the model's own
        reply = await client.complete(asked(5, 9, stop_ids=range(64), ignore_end=False))
    assert reply.choices[0].route == pb.ROUTE_FULL_MODEL


async def test_a_killed_full_model_ends_its_streams_by_name(two_homes: Up) -> None:
    async with Streams(two_homes, route=pb.ROUTE_FULL_MODEL) as streams:
        await asyncio.to_thread(two_homes.kill, "full_model.0")
        for error in await streams.ends():
            assert isinstance(error, Unavailable)
            assert error.stage == "full_model"


async def test_streams_go_on_without_an_expert_if_they_may(two_groups: Up, expected: list[list[Answer]]) -> None:
    async with Streams(two_groups) as streams, Streams(two_groups, pb.CONTRACT_MESH_ONLY) as strict:
        await asyncio.to_thread(two_groups.kill, "experts-4-7.0")
        assert await streams.ends() == expected
        for error in await strict.ends():
            assert isinstance(error, Unavailable)
            assert error.stage == "experts-4-7"
            assert error.layer in (0, 1, 2)
            assert error.expert in (4, 5, 6, 7)
    assert streams.routes() == [[pb.ROUTE_MESH, pb.ROUTE_FULL_MODEL]] * len(REQUESTS)
    assert await used_blocks(two_groups, "gating.0", "full_model.0") == 0


async def test_once_it_is_back_the_mesh_serves_again(two_groups: Up, expected: list[list[Answer]]) -> None:
    two_groups.start_again("experts-4-7.0")
    async with Client(two_groups.grpc) as client:

        async def by_mesh() -> bool:
            return (await client.complete(asked(3, 1))).choices[0].route == pb.ROUTE_MESH

        await until(by_mesh)
    async with Streams(two_groups) as streams:
        assert await streams.ends() == expected
    assert streams.routes() == [[pb.ROUTE_MESH]] * len(REQUESTS)


async def test_text_goes_on_when_the_tokenizer_is_killed(two_groups: Up, expected: list[list[Answer]]) -> None:
    async with Streams(two_groups) as streams:
        await asyncio.to_thread(two_groups.kill, "tokenizer.0")
        assert await streams.ends() == expected
    assert streams.routes() == [[pb.ROUTE_MESH]] * len(REQUESTS)


async def test_sequences_of_a_gateway_that_is_killed_are_forgotten(two_groups: Up) -> None:
    two_groups.start_again("tokenizer.0")
    async with Client(two_groups.grpc) as client:

        async def by_mesh() -> bool:
            return (await client.complete(asked(3, 1))).choices[0].route == pb.ROUTE_MESH

        await until(by_mesh)
    async with Streams(two_groups) as streams:
        assert await used_blocks(two_groups, "gating.0") > 0
        await asyncio.to_thread(two_groups.kill, "gateway.0")
        assert all(isinstance(error, Unavailable) for error in await streams.ends())

    async def is_free() -> bool:
        return await used_blocks(two_groups, "gating.0") == 0

    await until(is_free)
