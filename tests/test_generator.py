from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import numpy as np
import pytest

from expertmesh import wire
from expertmesh.errors import MeshError, Unavailable
from expertmesh.rpc.replicas import caller, replica
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.sampling_pb2 import TokenLogprob
from services.gateway import homes
from tests.doubles.tampering import Tampering
from tests.generating import Answer, answers_of, asked, by_route
from tests.small_mesh import small_mesh

REQUESTS = [
    asked(3, 12),
    asked(40, 9, temperature=1.1, seed=3, logprobs=2),
    asked(140, 6, temperature=1.0, seed=4, n=2),
]
PATIENCE_S = 20


def spoil(field: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Any, Any], Awaitable[Any]]:
    """Changes one tensor of a reply."""

    async def tamper(reply: Any, context: Any) -> Any:
        tensor = getattr(reply, field)
        dtype = wire.INT32 if field == "expert_ids" else wire.FLOAT32
        array = wire.decode(tensor, dtype, tuple(tensor.shape), field).copy()
        tensor.CopyFrom(wire.encode(np.ascontiguousarray(change(array))))
        return reply

    return tamper


def with_value(value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[-1, -1] = value
        return array

    return change


def spoil_token(change: Callable[[Any], object]) -> Callable[[Any, Any], Awaitable[Any]]:
    """Changes the last token of a reply of the head."""

    async def tamper(reply: Any, context: Any) -> Any:
        change(reply.tokens[-1])
        return reply

    return tamper


async def hang(reply: Any, context: Any) -> Any:
    await asyncio.Event().wait()


async def crash(reply: Any, context: Any) -> Any:
    raise RuntimeError("a defect")


async def nothing(reply: Any, context: Any) -> Any:
    reply.Clear()
    return reply


def refuse(code: grpc.StatusCode) -> Callable[[Any, Any], Awaitable[Any]]:
    async def tamper(reply: Any, context: Any) -> Any:
        await context.abort(code, "not today")

    return tamper


async def drop_token(reply: Any, context: Any) -> Any:
    del reply.tokens[-1]
    return reply


GATE = {
    "nothing": nothing,
    "NaN": spoil("residual", with_value(np.nan)),
    "infinite weights": spoil("weights", with_value(np.inf)),
    "a row too few": spoil("residual", lambda array: array[:-1]),
    "a column too many": spoil("expert_input", lambda array: np.pad(array, ((0, 0), (0, 1)))),
    "an expert that there is not": spoil("expert_ids", with_value(8)),
    "an expert twice": spoil("expert_ids", lambda array: np.zeros_like(array)),
    "a crash": crash,
    "a hang": hang,
    "INVALID_ARGUMENT": refuse(grpc.StatusCode.INVALID_ARGUMENT),
    "FAILED_PRECONDITION": refuse(grpc.StatusCode.FAILED_PRECONDITION),
    "RESOURCE_EXHAUSTED": refuse(grpc.StatusCode.RESOURCE_EXHAUSTED),
    "UNAVAILABLE": refuse(grpc.StatusCode.UNAVAILABLE),
}
SAMPLE = {
    "nothing": nothing,
    "a token too few": drop_token,
    "no token of the model": spoil_token(lambda token: setattr(token, "id", 512)),
    "a negative token": spoil_token(lambda token: setattr(token, "id", -1)),
    "a log probability too many": spoil_token(lambda token: token.top.append(TokenLogprob(id=1, logprob=-1))),
    "a crash": crash,
    "a hang": hang,
    "INVALID_ARGUMENT": refuse(grpc.StatusCode.INVALID_ARGUMENT),
    "RESOURCE_EXHAUSTED": refuse(grpc.StatusCode.RESOURCE_EXHAUSTED),
}
CASES = [
    *[("gating", "Gate", name, tamper) for name, tamper in GATE.items()],
    ("gating", "Open", "a crash", crash),
    ("gating", "Open", "a hang", hang),
    ("gating", "Open", "FAILED_PRECONDITION", refuse(grpc.StatusCode.FAILED_PRECONDITION)),
    ("gating", "Release", "a crash", crash),
    *[("classifier", "Sample", name, tamper) for name, tamper in SAMPLE.items()],
    ("embedding", "Embed", "NaN", spoil("rows", with_value(np.nan))),
    ("expert", "Apply", "NaN", spoil("rows", with_value(np.nan))),
    ("expert", "Apply", "a hang", hang),
    ("tokenizer", "DecodeBatch", "nothing", nothing),
]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caller, "ATTEMPT_TIMEOUT_S", 0.5)
    monkeypatch.setattr(replica, "RETRY_REFUSED_S", 0.2)
    monkeypatch.setattr(homes, "CALL_TIMEOUT_S", 0.5)


@pytest.fixture(scope="module")
def expected() -> list[list[Answer]]:
    async def ask() -> list[list[Answer]]:
        async with small_mesh() as mesh:
            return [answers_of(await mesh.client.complete(request)) for request in REQUESTS]

    return asyncio.run(ask())


def under(contract: pb.Contract) -> list[pb.GenerateRequest]:
    changed = [pb.GenerateRequest() for _ in REQUESTS]
    for one, request in zip(changed, REQUESTS, strict=True):
        one.CopyFrom(request)
        one.contract = contract
    return changed


@pytest.mark.parametrize(("kind", "method", "name", "tamper"), CASES, ids=[" ".join(case[:3]) for case in CASES])
async def test_what_goes_wrong_in_one_place_hangs_nobody_and_changes_no_token(
    kind: str, method: str, name: str, tamper: Any, expected: list[list[Answer]], capfd: pytest.CaptureFixture[str]
) -> None:
    doubles: list[Tampering] = []

    def wrap(honest: Any) -> Tampering:
        doubles.append(Tampering(honest, method, tamper))
        return doubles[0]

    async with small_mesh(wraps={kind: wrap}) as mesh, asyncio.timeout(PATIENCE_S):
        strict = [asyncio.create_task(mesh.client.complete(request)) for request in under(pb.CONTRACT_MESH_ONLY)]
        replies = await asyncio.gather(*map(mesh.client.complete, REQUESTS))
        assert [answers_of(reply) for reply in replies] == expected
        assert all(choice.exact for reply in replies for choice in reply.choices)
        for end in await asyncio.gather(*strict, return_exceptions=True):
            if method == "DecodeBatch":  # which the full model does as well
                assert isinstance(end, pb.CompleteResponse)
            elif method != "Release":  # the last of them does no harm any more
                assert isinstance(end, Unavailable)
        assert doubles[0].calls > 0

        doubles[0].times = 0
        routes = set()
        while pb.ROUTE_MESH not in routes:
            reply = await mesh.client.complete(REQUESTS[1])
            assert answers_of(reply) == expected[1]
            routes = {choice.route for choice in reply.choices}
        while mesh.free_blocks[0] < mesh.free_blocks[1]:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("kind", "method", "tamper"),
    [("gating", "Gate", crash), ("gating", "Gate", hang), ("classifier", "Sample", drop_token)],
)
async def test_what_goes_wrong_once_in_the_middle_is_made_good(
    kind: str, method: str, tamper: Any, expected: list[list[Answer]], capfd: pytest.CaptureFixture[str]
) -> None:
    doubles: list[Tampering] = []

    def wrap(honest: Any) -> Tampering:
        doubles.append(Tampering(honest, method, tamper))
        doubles[0].times = 0
        return doubles[0]

    async with small_mesh(wraps={kind: wrap}) as mesh, asyncio.timeout(PATIENCE_S):
        stream = mesh.client.generate(REQUESTS[0])
        messages = [await anext(stream) for _ in range(4)]
        doubles[0].times = 1
        messages += [message async for message in stream]
    assert tuple(token.id for message in messages for token in message.tokens) == expected[0][0].tokens
    assert [message.route for message in messages[:4]] == [pb.ROUTE_MESH] * 4
    assert messages[-1].route == pb.ROUTE_FULL_MODEL
    assert doubles[0].calls == 1


async def test_without_a_full_model_the_error_names_the_stage(capfd: pytest.CaptureFixture[str]) -> None:
    async with small_mesh(wraps={"expert": lambda honest: Tampering(honest, "Apply", hang)}, full_model=False) as mesh:
        with pytest.raises(MeshError) as caught:
            await mesh.client.complete(REQUESTS[0])
    assert isinstance(caught.value, Unavailable)
    assert caught.value.stage == "expert"
    assert caught.value.layer == 0


async def test_what_a_home_was_not_told_to_free_it_is_told_later() -> None:
    doubles: list[Any] = []

    class Deaf(Tampering):
        async def Release(self, request: Any, context: Any) -> Any:
            self.times -= 1
            if self.times >= 0:
                await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "not heard")
            return await self._honest.Release(request, context)

    def wrap(honest: Any) -> Deaf:
        doubles.append(Deaf(honest, "", crash))
        doubles[0].times = 2
        return doubles[0]

    async with small_mesh(wraps={"gating": wrap}, full_model=False) as mesh, asyncio.timeout(PATIENCE_S):
        await mesh.client.complete(REQUESTS[0])
        while doubles[0].times > 1:
            await asyncio.sleep(0)
        assert mesh.free_blocks[0] == mesh.free_blocks[1] - 1
        await mesh.client.complete(REQUESTS[0])
        while mesh.free_blocks[0] < mesh.free_blocks[1]:
            await asyncio.sleep(0.01)
        assert doubles[0].times < 0


async def test_a_stream_of_the_full_model_that_ends_before_its_last_token_is_an_error() -> None:
    class Curt(Tampering):
        async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
            async with aclosing(self._honest.Generate(request, context)) as messages:
                for _ in range(3):
                    yield await anext(messages)

    wraps = {"full_model": lambda honest: Curt(honest, "", crash)}
    async with small_mesh(wraps=wraps) as mesh, asyncio.timeout(PATIENCE_S):
        messages: list[pb.GenerateResponse] = []

        async def listen() -> None:
            async for message in mesh.client.generate(by_route(REQUESTS[0], pb.ROUTE_FULL_MODEL)):
                messages.append(message)

        with pytest.raises(Unavailable, match="before its last token"):
            await listen()
        assert 3 <= len(messages) < REQUESTS[0].max_tokens
