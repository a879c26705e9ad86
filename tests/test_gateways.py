"""A client of several gateways: what it does when one of them goes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from expertmesh.client import Client
from expertmesh.errors import SetupError, Unavailable
from expertmesh.resumption import Resumption
from expertmesh.rpc.channel import SERVER_OPTIONS
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.inference_pb2_grpc import add_InferenceServiceServicer_to_server
from tests.doubles.scripted import HELLO, Scripted, Step, said

ASKED = pb.GenerateRequest(text="Say", max_tokens=4)
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


class Gateway:
    """A scripted gateway that says how it is, and can be lost."""

    def __init__(self, *steps: Step) -> None:
        self.double = Scripted(*steps)
        self.health = HealthServicer()

    @asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
        add_InferenceServiceServicer_to_server(self.double, self.server)
        health_pb2_grpc.add_HealthServicer_to_server(self.health, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        await self.health.set("", SERVING)
        await self.server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await self.server.stop(None)

    async def lose(self) -> None:
        """Ends its server, and what is under way there."""
        await self.server.stop(None)


@asynccontextmanager
async def two(first: Gateway, second: Gateway) -> AsyncIterator[Client]:
    async with first.served() as one, second.served() as other, Client([one, other], timeout_s=20) as client:
        yield client


async def until_connected(client: Client, *gateways: Gateway) -> None:
    while not all(gateway.double.tokenized for gateway in gateways):
        await client.tokenize(pb.TokenizeRequest(text="Say"))


async def test_calls_go_round_and_keep_from_a_gateway_that_does_not_serve() -> None:
    first, second = Gateway(), Gateway()
    async with two(first, second) as client:
        async with asyncio.timeout(20):
            await until_connected(client, first, second)
            await first.health.set("", NOT_SERVING)
            before = -1
            while before != len(first.double.tokenized):  # until a whole round of calls keeps from it
                before = len(first.double.tokenized)
                for _ in range(20):
                    await client.tokenize(pb.TokenizeRequest(text="Say"))
            given = len(second.double.tokenized)
            await first.health.set("", SERVING)
            while before == len(first.double.tokenized):
                await client.tokenize(pb.TokenizeRequest(text="Say"))
        assert given > 0


async def test_calls_that_a_lost_gateway_had_are_made_again() -> None:
    never = asyncio.Event()
    first, second = Gateway(never), Gateway()
    async with two(first, second) as client, asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        await until_connected(client, first, second)
        calls = [tasks.create_task(client.complete(ASKED)) for _ in range(16)]
        await first.double.started.wait()
        await first.lose()
        replies = await asyncio.gather(*calls)
    assert {reply.choices[0].text for reply in replies} == {"Hello!"}
    assert first.double.requests
    assert len(second.double.requests) == 16


@pytest.mark.parametrize("given", range(4))
async def test_a_stream_goes_on_at_another_gateway(given: int) -> None:
    gates = [asyncio.Event(), asyncio.Event()]
    gateways = [Gateway(*HELLO[:given], gate, *HELLO[given:]) for gate in gates]
    messages: list[pb.GenerateResponse] = []

    async def read(client: Client) -> None:
        async for message in client.generate(ASKED):
            messages.append(message)

    async with two(*gateways) as client, asyncio.timeout(20), asyncio.TaskGroup() as tasks:
        tasks.create_task(read(client))
        while not any(one.double.requests for one in gateways):
            await asyncio.sleep(0)
        asked, other = sorted(range(2), key=lambda one: not gateways[one].double.requests)
        while len(messages) < given:
            await asyncio.sleep(0)
        gates[other].set()
        await gateways[asked].lose()
    assert messages == list(HELLO)
    if given < len(HELLO):
        assert [request.seed for request in gateways[other].double.requests] == [7 if given else 0]


class Early(Scripted):
    """Says who answers before it has anything to say, as the gateway does."""

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        await context.send_initial_metadata((("who", "it is"),))
        async for message in super().Generate(request, context):
            yield message


async def test_a_stream_goes_on_elsewhere_that_is_lost_before_its_first_message() -> None:
    gates = [asyncio.Event(), asyncio.Event()]
    gateways = [Gateway(gate) for gate in gates]
    for gateway, gate in zip(gateways, gates, strict=True):
        gateway.double = Early(gate, *HELLO)
    async with two(*gateways) as client, asyncio.timeout(20):
        reading = asyncio.create_task(_read(client))
        while not any(one.double.requests for one in gateways):
            await asyncio.sleep(0)
        asked, other = sorted(range(2), key=lambda one: not gateways[one].double.requests)
        gates[other].set()
        await gateways[asked].lose()
        assert await reading == list(HELLO)


async def _read(client: Client) -> list[pb.GenerateResponse]:
    return [message async for message in client.generate(ASKED)]


def replayed(*parts: tuple[pb.GenerateResponse, ...]) -> list[pb.GenerateResponse]:
    """What a caller sees of some streams, each but the last cut off."""
    so_far = Resumption(ASKED)
    seen = []
    for stream in parts:
        so_far.begin_again()
        seen += [part for message in stream if (part := so_far.new_part(message)) is not None]
    return seen


def joined(messages: list[pb.GenerateResponse]) -> dict[int, tuple[str, list[int], int]]:
    choices: dict[int, Any] = {}
    for message in messages:
        text, ids, finished = choices.get(message.choice, ("", [], 0))
        ids = ids + [token.id for token in message.tokens]
        choices[message.choice] = (text + message.text, ids, finished + (message.finish_reason != 0))
    return choices


def test_choices_and_messages_of_another_cut_are_put_together() -> None:
    usage = pb.Usage(prompt_tokens=1, completion_tokens=5)
    once = (
        said("", 0, [1]),
        said("ab", 1, [7, 8]),
        said("xy", 0, [2], finish=pb.FINISH_REASON_STOP),
        said("c", 1, [9], finish=pb.FINISH_REASON_LENGTH, usage=usage),
    )
    again = (
        said("a", 1, [7]),
        said("x", 0, [1]),
        said("bc", 1, [8, 9], finish=pb.FINISH_REASON_LENGTH),
        said("y", 0, [2], finish=pb.FINISH_REASON_STOP, usage=usage),
    )
    for cut in range(len(once)):
        for second_cut in range(len(again)):
            seen = replayed(once[:cut], again[:second_cut], once)
            assert joined(seen) == {0: ("xy", [1, 2], 1), 1: ("abc", [7, 8, 9], 1)}
            assert [message.usage for message in seen if message.HasField("usage")] == [usage]


def test_an_answer_that_comes_out_differently_is_no_answer() -> None:
    for other in (said("Hel", ids=[2]), said("Hal", ids=[1])):
        with pytest.raises(Unavailable, match="came out differently"):
            replayed(HELLO[:1], (other,))


@pytest.mark.parametrize(
    "steps", [(said("a", ids=[1], exact=False),), (said("a", ids=[1]), Unavailable("no", "expert-3"))]
)
async def test_what_cannot_be_had_again_or_failed_for_a_reason_is_an_error(steps: tuple[Step, ...]) -> None:
    first, second = Gateway(*steps, asyncio.Event()), Gateway(*steps, asyncio.Event())
    async with two(first, second) as client, aclosing(client.generate(ASKED)) as stream, asyncio.timeout(20):
        await anext(stream)
        asked = len(first.double.requests) + len(second.double.requests)
        await asyncio.gather(*(one.lose() for one in (first, second) if one.double.requests))
        with pytest.raises(Unavailable):
            await anext(stream)
        assert asked == len(first.double.requests) + len(second.double.requests) == 1


def test_several_gateways_are_given_by_ip_address() -> None:
    for wrong in ("127.0.0.1:1,example.org:1", "127.0.0.1:1,[::1]:1", "127.0.0.1:1,"):
        with pytest.raises(SetupError):
            Client(wrong)
