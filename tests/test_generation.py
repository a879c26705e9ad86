from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from expertmesh.client import Client
from expertmesh.v1 import inference_pb2 as pb
from tests.generating import (
    Answer,
    answer_of,
    answers_of,
    asked,
    by_route,
    completed,
    ids,
    mixed_requests,
    model,
    streamed,
    used_blocks,
)
from tests.up import Up


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with Up(model(), "--expert-services", "2", "--no-restart") as running:
        yield running


@pytest.fixture(scope="module")
def alone(up: Up) -> list[list[Answer]]:
    """What each of the mixed requests gets when it is the only one."""

    async def one_by_one() -> list[list[Answer]]:
        async with Client(up.grpc) as client:
            return [answers_of(await client.complete(request)) for request in mixed_requests()]

    return asyncio.run(one_by_one())


def test_the_mixed_requests_cover_what_they_should(alone: list[list[Answer]]) -> None:
    finishes = {answer.finish for answers in alone for answer in answers}
    assert finishes == {pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH}
    stopped = [
        answer.tokens
        for request, answers in zip(mixed_requests(), alone, strict=True)
        for answer in answers
        if request.stop and answer.finish == pb.FINISH_REASON_STOP
    ]
    assert any(len(tokens) > 1 for tokens in stopped)
    assert len({answer.tokens for answers in alone for answer in answers}) > 25
    assert {len(answers) for answers in alone} == {1, 2}
    assert any(top for answers in alone for answer in answers for _, top in answer.logprobs)


async def test_32_at_once_get_what_each_gets_alone(up: Up, alone: list[list[Answer]]) -> None:
    async with Client(up.grpc) as client:
        assert await completed(client, mixed_requests()) == alone


async def test_streams_say_what_whole_replies_say(up: Up, alone: list[list[Answer]]) -> None:
    async with Client(up.grpc) as client:
        streams = await asyncio.gather(*(streamed(client, request) for request in mixed_requests()))
    for request, messages, answers in zip(mixed_requests(), streams, alone, strict=True):
        choices = range(request.first_choice, request.first_choice + (request.n or 1))
        assert [answer_of(messages, choice) for choice in choices] == answers
        assert {message.route for message in messages} == {pb.ROUTE_MESH}
        assert all(message.exact for message in messages)
        assert [message.HasField("usage") for message in messages] == [False] * (len(messages) - 1) + [True]
        assert messages[-1].usage.prompt_tokens == len(request.ids.ids)
        assert messages[-1].usage.completion_tokens == sum(len(answer.tokens) for answer in answers)


async def test_the_full_model_gives_the_same(up: Up, alone: list[list[Answer]]) -> None:
    async with Client(up.grpc) as client:
        requests = [by_route(request, pb.ROUTE_FULL_MODEL) for request in mixed_requests()]
        replies = await asyncio.gather(*map(client.complete, requests))
    assert [answers_of(reply) for reply in replies] == alone
    assert {choice.route for reply in replies for choice in reply.choices} == {pb.ROUTE_FULL_MODEL}


async def test_two_homes_and_experts_spread_otherwise_give_the_same(alone: list[list[Answer]]) -> None:
    spread = ("--expert-services", "8", "--replicas", "gating=2", "--replicas", "expert=2", "--no-full-model")
    with Up(model(), *spread, "--no-restart", environment={"EXPERTMESH_STEP_ROWS": "48"}) as up:
        async with Client(up.grpc) as client:
            assert await completed(client, mixed_requests()) == alone
            running = asyncio.gather(*(client.complete(asked(200, 60)) for _ in range(8)))
            while await used_blocks(up, "gating.0") == 0 or await used_blocks(up, "gating.1") == 0:
                assert not running.done(), "one home has served them all"
            await running


async def test_a_seed_that_is_drawn_gives_the_same_when_it_is_asked_for(up: Up) -> None:
    async with Client(up.grpc) as client:
        first = await client.complete(asked(5, 12, temperature=1.4, n=2))
        second = await client.complete(asked(5, 12, temperature=1.4, n=2))
        assert first.seed != second.seed
        again = await client.complete(asked(5, 12, temperature=1.4, n=2, seed=first.seed))
    assert answers_of(again) == answers_of(first)
    assert answers_of(first) != answers_of(second)
    assert first.choices[0].tokens != first.choices[1].tokens


@pytest.mark.parametrize("route", [pb.ROUTE_MESH, pb.ROUTE_FULL_MODEL])
async def test_a_choice_goes_on_elsewhere_with_its_number(up: Up, route: pb.Route) -> None:
    prompt = ids(9)
    async with Client(up.grpc) as client:
        whole = await client.complete(asked(prompt, 20, temperature=1.4, seed=5, n=3))
        known = [token.id for token in whole.choices[2].tokens[:8]]
        resumed = asked(prompt + known, 12, temperature=1.4, seed=5, first_choice=2, route=route)
        rest = await client.complete(resumed)
        resumed.first_choice = 0
        other = await client.complete(resumed)
    assert [token.id for token in rest.choices[0].tokens] == [token.id for token in whole.choices[2].tokens[8:]]
    assert [token.id for token in other.choices[0].tokens] != [token.id for token in rest.choices[0].tokens]
