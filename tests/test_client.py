from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from expertmesh.client import Client
from expertmesh.errors import DeadlineExceeded, InvalidInput, WrongPart
from expertmesh.v1 import inference_pb2 as pb
from tests.doubles.scripted import HELLO, Scripted, said

ASKED = pb.GenerateRequest(text="Say", max_tokens=4)


async def test_messages_come_one_by_one() -> None:
    gate = asyncio.Event()
    double = Scripted(HELLO[0], gate, *HELLO[1:])
    async with double.served() as address, Client(address) as client, aclosing(client.generate(ASKED)) as messages:
        assert await anext(messages) == HELLO[0]
        assert not double.closed.is_set()
        gate.set()
        assert [message async for message in messages] == list(HELLO[1:])
    assert double.requests == [ASKED]
    assert 590 < double.timeouts_s[0] <= 600


async def test_complete_and_tokenize() -> None:
    double = Scripted()
    async with double.served() as address, Client(address, timeout_s=7) as client:
        reply = await client.complete(ASKED)
        ids = (await client.tokenize(pb.TokenizeRequest(text="Say"))).ids
    assert [choice.text for choice in reply.choices] == ["Hello!"]
    assert reply.usage == pb.Usage(prompt_tokens=5, completion_tokens=4)
    assert list(ids) == [1, 5, 9]
    assert 6 < double.timeouts_s[0] < 7.5  # gRPC rounds up


async def test_a_stream_that_is_left_is_cancelled() -> None:
    double = Scripted(said("a", ids=[1]), asyncio.Event())
    async with double.served() as address, Client(address) as client:
        async with aclosing(client.generate(ASKED)) as messages:
            async for _ in messages:
                break
        await asyncio.wait_for(double.closed.wait(), 10)


async def test_a_task_that_is_cancelled_cancels_its_stream() -> None:
    double = Scripted(said("a", ids=[1]), asyncio.Event())

    async def read() -> None:
        async for _ in client.generate(ASKED):
            pass

    async with double.served() as address, Client(address) as client:
        task = asyncio.create_task(read())
        await asyncio.wait_for(double.started.wait(), 10)
        task.cancel()
        await asyncio.wait_for(double.closed.wait(), 10)
        with pytest.raises(asyncio.CancelledError):
            await task


@pytest.mark.parametrize("error", [InvalidInput("too long", "text"), WrongPart("this model classifies")])
@pytest.mark.parametrize("begun", [False, True])
async def test_errors_are_those_of_the_mesh(begun: bool, error: InvalidInput | WrongPart) -> None:
    double = Scripted(*([said("a", ids=[1])] if begun else []), error)
    async with double.served() as address, Client(address) as client, aclosing(client.generate(ASKED)) as messages:
        if begun:
            await anext(messages)
        with pytest.raises(type(error), match=str(error)):
            await anext(messages)


async def test_a_deadline_ends_a_stream() -> None:
    double = Scripted(said("a", ids=[1]), asyncio.Event())
    async with double.served() as address, Client(address, timeout_s=0.3) as client:
        with pytest.raises(DeadlineExceeded):
            [message async for message in client.generate(ASKED)]
        await asyncio.wait_for(double.closed.wait(), 10)
