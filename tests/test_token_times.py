from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import pytest

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.errors import DeadlineExceeded
from expertmesh.rpc.deadline import Deadline
from expertmesh.serving.generation import Generation, Token, Wish, Witnesses
from expertmesh.serving.generator import Generator
from expertmesh.serving.passes import Provenance
from expertmesh.telemetry import metrics
from expertmesh.v1.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_UNSPECIFIED,
    ROUTE_FULL_MODEL,
    ROUTE_MESH,
    Contract,
    GenerateRequest,
    Route,
)
from expertmesh.v1.sampling_pb2 import TokenLogprobs
from expertmesh.v1.tokenizer_pb2 import EncodePromptRequest
from tests.doubles.keeper import wish
from tests.doubles.simulated_time import run_simulated
from tests.generating import model


class Slow:
    """Takes a second to encode a prompt and to decode, two for the first token and half a second for each other."""

    async def encode(self, request: EncodePromptRequest, deadline: Deadline) -> list[int]:
        await asyncio.sleep(1.0)
        return [3, 4, 5]

    async def decode(self, sequences: Sequence[Sequence[int]], deadline: Deadline) -> list[str]:
        await asyncio.sleep(1.0)
        return ["a" * len(one) for one in sequences]

    async def tokens(self, asked: Wish, contract: Contract, route: Route) -> AsyncGenerator[Token, None]:
        for number in range(asked.max_tokens):
            await asyncio.sleep(0.5 if number else 2.0)
            finish = FINISH_REASON_LENGTH if number == asked.max_tokens - 1 else FINISH_REASON_UNSPECIFIED
            yield Token(TokenLogprobs(id=7), finish, Provenance(route, True, "cpu-fp32 x"))


def counted(histogram: Any, route: str) -> tuple[float, float]:
    """(how many, their sum) of one route."""
    samples = {one.name: one.value for one in histogram.labels(route)._child_samples()}
    return samples["_count"], samples["_sum"]


@pytest.mark.parametrize("route", [ROUTE_MESH, ROUTE_FULL_MODEL])
def test_the_first_token_counts_from_arrival_and_each_by_its_route(route: Route) -> None:
    name = Route.Name(route)
    before = counted(metrics.FIRST_TOKEN_SECONDS, name), counted(metrics.NEXT_TOKEN_SECONDS, name)

    async def main() -> None:
        generator = Generator(Manifest.read(model()).spec, Slow(), Slow())
        request = GenerateRequest(text="abc", max_tokens=3, temperature=0.0, ignore_end=True, route=route)
        async with aclosing(generator.generate(request, Deadline.after(60))) as messages:
            assert len([message async for message in messages]) == 3

    run_simulated(main())
    first, following = counted(metrics.FIRST_TOKEN_SECONDS, name), counted(metrics.NEXT_TOKEN_SECONDS, name)
    assert first[0] - before[0][0] == 1
    assert first[1] - before[0][1] == pytest.approx(3.0)  # encoding is part of it, decoding is not
    assert following[0] - before[1][0] == 2


def test_a_deadline_is_told_to_whoever_reads_slowly_too() -> None:
    async def main() -> None:
        generation = Generation(wish(3, 9, wait_s=1.0))
        async with aclosing(generation.tokens()) as tokens:
            for _ in range(3):
                generation.add(TokenLogprobs(id=1), ROUTE_MESH)
            await anext(tokens)
            await asyncio.sleep(2.0)
            with pytest.raises(DeadlineExceeded):
                await anext(tokens)
        assert generation.left

    run_simulated(main())


def test_a_deadline_that_has_passed_ends_it_before_it_begins() -> None:
    async def main() -> None:
        generation = Generation(wish(3, 9, wait_s=0.0))
        with pytest.raises(DeadlineExceeded):
            await anext(generation.tokens())
        assert generation.left

    run_simulated(main())


def test_witnesses_say_what_all_steps_were() -> None:
    witnesses = Witnesses()
    witnesses.add(Provenance(ROUTE_MESH, True, "cpu-fp32 a"))
    assert witnesses.provenance(ROUTE_MESH) == Provenance(ROUTE_MESH, True, "cpu-fp32 a")
    assert witnesses.provenance(ROUTE_FULL_MODEL) == Provenance(ROUTE_FULL_MODEL, True, "cpu-fp32 a")
    witnesses.add(Provenance(ROUTE_MESH, True, "cpu-fp32 b"))
    witnesses.add(Provenance(ROUTE_MESH, True, "cpu-fp32 a"))
    assert witnesses.provenance(ROUTE_MESH) == Provenance(ROUTE_MESH, False, "cpu-fp32 a + cpu-fp32 b")
    inexact = Witnesses()
    inexact.add(Provenance(ROUTE_MESH, False, "cpu-fp32 a"))
    inexact.add(Provenance(ROUTE_MESH, True, "cpu-fp32 a"))
    assert not inexact.provenance(ROUTE_MESH).exact
