from __future__ import annotations

import asyncio
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh import wire
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.origin import Origin
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.classifier_pb2 import Draw, SampleRequest, SampleResponse
from expertmesh.v1.sampling_pb2 import TokenLogprobs
from expertmesh.v1.tensor_pb2 import DATA_TYPE_BFLOAT16, DATA_TYPE_FLOAT16, DATA_TYPE_FLOAT32
from services.gateway.stage_calls import StageCalls, cut
from tests.doubles.tampering import Tampering
from tests.generating import Answer, answers_of, asked, by_route, model
from tests.small_mesh import small_mesh

REQUESTS = [
    asked(3, 12),
    asked(40, 9, temperature=1.1, seed=3, logprobs=2),
    asked(140, 6, temperature=1.0, seed=4, n=2),
]


async def crash(reply: Any, context: Any) -> Any:
    raise RuntimeError("a defect")


@pytest.fixture(scope="module")
def expected() -> list[list[Answer]]:
    async def ask() -> list[list[Answer]]:
        async with small_mesh() as mesh:
            return [answers_of(await mesh.client.complete(request)) for request in REQUESTS]

    return asyncio.run(ask())


# Messages that are cut, and rows that travel narrower.

LONG = [asked(300, 4), asked(211, 8, temperature=1.0, seed=9, repetition_penalty=1.2, logprobs=5)]


@pytest.mark.parametrize("max_message_bytes", [2**17, 2**14, 2**12])
async def test_messages_are_cut_below_the_limit_and_the_bits_are_the_same(max_message_bytes: int) -> None:
    async with small_mesh(full_model=False) as whole:
        expected = [answers_of(await whole.client.complete(request)) for request in LONG]
    async with small_mesh(full_model=False, max_message_bytes=max_message_bytes) as mesh:
        replies = await asyncio.gather(*map(mesh.client.complete, LONG * 6))
    assert [answers_of(reply) for reply in replies] == expected * 6


async def test_draws_that_are_large_go_to_the_head_in_several_messages() -> None:
    sent: list[SampleRequest] = []

    class Head:
        async def call(self, method: str, request: SampleRequest, deadline: Deadline, read: Any) -> Any:
            sent.append(request)
            tokens = [TokenLogprobs(id=draw.position) for draw in request.draws]
            return read(SampleResponse(tokens=tokens), Origin("", "cpu"))

    mesh: Any = SimpleNamespace(manifest=Manifest.read(model()), classifier=Head(), message_bytes=4000)
    draws = [Draw(position=number, seen=range(number, 512), logprobs=-1) for number in range(20)]
    rows_BD = np.arange(20 * 64, dtype=np.float32).reshape(20, 64)
    tokens = await StageCalls(mesh, Deadline.after(10)).sample(rows_BD, draws)
    assert [token.id for token in tokens] == list(range(20))
    assert len(sent) == 7  # about 1.2 kB for each
    assert max(request.ByteSize() for request in sent) < 4096
    assert b"".join(request.rows.data for request in sent) == rows_BD.tobytes()


@given(sizes=st.lists(st.integers(0, 60), max_size=40), most=st.integers(1, 100))
def test_items_are_cut_in_order_and_none_is_lost(sizes: list[int], most: int) -> None:
    runs = [sizes[run] for run in cut(sizes, most)]
    assert [size for run in runs for size in run] == sizes
    assert all(sum(run) <= most or len(run) == 1 for run in runs)
    assert all(sum(run) + following[0] > most for run, following in pairwise(runs))


@pytest.mark.parametrize("wire_dtype", ["float16", "bfloat16"])
async def test_narrower_rows_give_tokens_that_are_not_said_to_be_exact(wire_dtype: str) -> None:
    dtypes = []

    class Watched(Tampering):
        async def Apply(self, request: Any, context: Any) -> Any:
            reply = await self._honest.Apply(request, context)
            dtypes.append((request.rows.dtype, reply.rows.dtype))
            return reply

    wraps = {"expert": lambda honest: Watched(honest, "", crash)}
    async with small_mesh(wraps=wraps, full_model=False, wire_dtype=wire_dtype) as mesh:
        reply = await mesh.client.complete(LONG[0])
    assert len(reply.choices[0].tokens) == 4
    assert not reply.choices[0].exact
    code = {"float16": DATA_TYPE_FLOAT16, "bfloat16": DATA_TYPE_BFLOAT16}[wire_dtype]
    assert set(dtypes) == {(code, code)}


async def test_rows_that_a_narrower_dtype_cannot_hold_travel_as_they_are(expected: list[list[Answer]]) -> None:
    seen = []

    class Large(Tampering):
        async def Apply(self, request: Any, context: Any) -> Any:
            seen.append(request.rows.dtype)
            return await self._honest.Apply(request, context)

    async def enlarge(reply: Any, context: Any) -> Any:
        rows = wire.decode_finite(reply.expert_input, tuple(reply.expert_input.shape), "rows").copy()
        rows[0, 0] = 1e6  # float16 ends at 65504
        reply.expert_input.CopyFrom(wire.encode(rows))
        return reply

    wraps = {
        "expert": lambda honest: Large(honest, "", crash),
        "gating": lambda honest: Tampering(honest, "Gate", enlarge),
    }
    async with small_mesh(wraps=wraps, full_model=False, wire_dtype="float16") as mesh:
        reply = await mesh.client.complete(asked(20, 3))
    assert len(reply.choices[0].tokens) == 3
    assert not reply.choices[0].exact
    assert set(seen) == {DATA_TYPE_FLOAT32}


async def test_rows_that_travel_in_the_models_own_dtype_are_exact(expected: list[list[Answer]]) -> None:
    async with small_mesh(wire_dtype="float32") as mesh:
        reply = await mesh.client.complete(REQUESTS[1])
    assert reply.choices[0].exact
    assert answers_of(reply) == expected[1]


@pytest.mark.parametrize("wire_dtype", ["", "bfloat16"])
async def test_a_model_in_bfloat16_gives_the_same_by_both_routes(wire_dtype: str) -> None:
    async with small_mesh(model(dtype="bfloat16"), wire_dtype=wire_dtype) as mesh:
        for request in REQUESTS:
            ours = await mesh.client.complete(request)
            theirs = await mesh.client.complete(by_route(request, pb.ROUTE_FULL_MODEL))
            assert answers_of(ours) == answers_of(theirs)
            assert {choice.route for choice in ours.choices} == {pb.ROUTE_MESH}
            assert all(choice.exact for choice in ours.choices)
