"""Services restart and scale under load, and no caller sees it: every reply is OK and has the bits it had before."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from expertmesh.client import Client
from expertmesh.local import control
from expertmesh.v1.inference_pb2 import (
    CONTRACT_MESH_ONLY,
    ROUTE_MESH,
    ClassifyResponse,
    GenerateRequest,
    GenerateResponse,
)
from tests.generating import asked
from tests.generating import model as generating_model
from tests.up import Up

CALLERS = 3
MESH_AGAIN_S = 5
SHAPE = ("--expert-services", "2", "--replicas", "gateway=2")
REQUESTS = [
    asked(40, 60),
    asked(20, 60, temperature=1.1, seed=5, logprobs=2),
    asked(30, 40, temperature=1.3, seed=6, n=2),
]


@dataclass
class Load:
    """What callers have seen."""

    ended: int = 0


@pytest.fixture(scope="module")
def classifying(model: Path) -> Iterator[Up]:
    with Up(model, *SHAPE) as up:
        yield up


@pytest.fixture(scope="module")
def generating() -> Iterator[Up]:
    with Up(generating_model(), *SHAPE) as up:
        yield up


@asynccontextmanager
async def load(caller: Callable[[int], Awaitable[None]]) -> AsyncIterator[Load]:
    """Callers that ask again as soon as they are answered, until the context ends; the first failure is raised."""
    counted, done = Load(), False

    async def ask_on(number: int) -> None:
        while not done:
            await caller(number)
            counted.ended += 1

    async with asyncio.TaskGroup() as tasks:
        for number in range(CALLERS):
            tasks.create_task(ask_on(number))
        yield counted
        done = True


async def change(up: Up, **request: Any) -> list[str]:
    return [text async for text in control.ask(up.run_dir, request)]


def bits(response: ClassifyResponse) -> list[tuple[float, ...]]:
    return [(*result.logits, *result.probabilities) for result in response.results]


def classify(client: Client, headlines: list[str], want: list[list[tuple[float, ...]]]) -> Callable[[int], Any]:
    async def caller(number: int) -> None:
        response = await client.classify(headlines[number : number + 3])
        assert bits(response) == want[number]
        assert all(result.exact for result in response.results)

    return caller


async def drawn(client: Client, request: GenerateRequest) -> dict[int, tuple[str, list[bytes], int]]:
    """By choice: its text, its tokens with their log probabilities, and why it ended."""
    choices: dict[int, tuple[str, list[bytes], int]] = {}
    async with aclosing(client.generate(request)) as messages:
        async for message in messages:
            assert message.exact
            choices[message.choice] = _added(choices.get(message.choice, ("", [], 0)), message)
    return choices


def _added(choice: tuple[str, list[bytes], int], message: GenerateResponse) -> tuple[str, list[bytes], int]:
    text, tokens, _ = choice
    return text + message.text, tokens + [token.SerializeToString() for token in message.tokens], message.finish_reason


@asynccontextmanager
async def classified(up: Up, headlines: list[str]) -> AsyncIterator[Load]:
    """Load of classification on both gateways of a mesh, which afterwards must be the one that answers."""
    async with Client(up.grpc, timeout_s=60) as client:
        want = [bits(await client.classify(headlines[number : number + 3])) for number in range(CALLERS)]
        async with load(classify(client, headlines, want)) as counted:
            yield counted
        async with asyncio.timeout(MESH_AGAIN_S):
            while {result.route for result in (await client.classify(headlines[:1])).results} != {ROUTE_MESH}:
                pass
        reply = await client.classify(headlines[:3], contract=CONTRACT_MESH_ONLY)
        assert bits(reply) == want[0]


async def test_a_restart_of_everything_loses_no_call(classifying: Up, headlines: list[str]) -> None:
    before = classifying.processes()
    async with classified(classifying, headlines) as counted:
        said = await change(classifying, do="restart", names=[])
    assert said[-1] == f"{len(before)}/{len(before)} restarted"
    assert counted.ended > CALLERS
    after = classifying.processes()
    assert not {process["pid"] for process in before.values()} & {process["pid"] for process in after.values()}


async def test_scaling_an_expert_up_and_down_loses_no_call(classifying: Up, headlines: list[str]) -> None:
    async with classified(classifying, headlines) as counted:
        for count in (4, 1):
            before = counted.ended
            await change(classifying, do="scale", counts={"experts-0-3": count})
            assert counted.ended > before
            names = [name for name, one in classifying.processes().items() if one["service"] == "experts-0-3"]
            assert len(names) == count


async def test_streams_do_not_see_a_restart_of_everything(generating: Up) -> None:
    async with Client(generating.grpc, timeout_s=120) as client:
        want = [await drawn(client, request) for request in REQUESTS]

        async def caller(number: int) -> None:
            assert await drawn(client, REQUESTS[number]) == want[number]

        async with load(caller) as counted:
            await change(generating, do="restart", names=[])
            await change(generating, do="scale", counts={"gating": 2})
            await change(generating, do="scale", counts={"gating": 1})
        assert counted.ended > 0
