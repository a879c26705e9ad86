from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from expertmesh import wire
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.errors import error_info
from expertmesh.rpc.settings import CacheSettings
from expertmesh.serving.caching import make_leases
from expertmesh.serving.leases import Leases
from expertmesh.serving.stage import Stage
from expertmesh.v1.gating_pb2 import GateRequest, GateResponse, OpenRequest, Place, ReleaseRequest
from expertmesh.v1.gating_pb2_grpc import GatingServiceStub, add_GatingServiceServicer_to_server
from services.gating.service import GatingServicer
from tests import tiny
from tests.generating import CONTEXT, model

WIDTH, LAYERS = 64, 3
A, B, NOBODY = b"a" * 16, b"b" * 16, b"?" * 16
INVALID = grpc.StatusCode.INVALID_ARGUMENT
WRONG = grpc.StatusCode.FAILED_PRECONDITION
FULL = grpc.StatusCode.RESOURCE_EXHAUSTED


class Gating:
    """A gating service with room for eight blocks, and who holds them."""

    def __init__(self, stub: Any, leases: Leases) -> None:
        self.stub = stub
        self.leases = leases

    async def open(self, sequence: bytes = A, epoch: int = 0, tokens: int = 300) -> None:
        await self.stub.Open(OpenRequest(sequence=sequence, epoch=epoch, tokens=tokens), timeout=10)

    async def gate(
        self, rows_TD: np.ndarray, places: Sequence[Place], lengths: Sequence[int] | None = None, layer: int = 0
    ) -> GateResponse:
        request = GateRequest(
            layer=layer,
            rows=wire.encode(rows_TD),
            lengths=tiny.wire_ids(*(lengths or [len(rows_TD)])),
            places=places,
        )
        reply: GateResponse = await self.stub.Gate(request, timeout=10)
        return reply


@pytest.fixture
async def gating() -> AsyncIterator[Gating]:
    stage = Stage("gating", CacheSettings(model=model(), kv_tokens=2 * CONTEXT))
    leases = make_leases(stage, 2 * CONTEXT, 30.0)
    servicer = GatingServicer(stage, leases)
    assert leases.free_blocks == 8  # the warm-up leaves nothing
    async with (
        tiny.served((add_GatingServiceServicer_to_server, servicer)) as address,
        open_channel(address) as channel,
    ):
        yield Gating(GatingServiceStub(channel), leases)


def rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def place(sequence: bytes = A, position: int = 0, epoch: int = 0) -> Place:
    return Place(sequence=sequence, epoch=epoch, position=position)


async def status(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def residual(reply: GateResponse) -> np.ndarray:
    return wire.decode_finite(reply.residual, (None, WIDTH), "residual")


async def test_a_repeated_call_gives_the_same_bits(gating: Gating) -> None:
    await gating.open()
    x_TD = rows(200)
    for layer in range(LAYERS):
        first = await gating.gate(x_TD[:150], [place()], layer=layer)
        assert await gating.gate(x_TD[:150], [place()], layer=layer) == first
        later = await gating.gate(x_TD[150:], [place(position=150)], layer=layer)
        assert await gating.gate(x_TD[150:], [place(position=150)], layer=layer) == later
        assert await gating.gate(x_TD[100:150], [place(position=100)], layer=layer) != first
        assert await gating.gate(x_TD[150:], [place(position=150)], layer=layer) == later  # nor does that disturb it


async def test_whole_in_chunks_and_in_company_are_the_same_bits(gating: Gating) -> None:
    await gating.open(A)
    await gating.open(B)
    x_TD, other_TD = rows(270), rows(40, seed=1)
    whole = residual(await gating.gate(x_TD, [place()]))
    await gating.open(A, epoch=1)
    pieces = []
    for start, stop in ((0, 1), (1, 130), (130, 131), (131, 270)):
        company = await gating.gate(
            np.concatenate([other_TD, x_TD[start:stop]]),
            [place(B), place(A, start, epoch=1)],
            [len(other_TD), stop - start],
        )
        pieces.append(residual(company)[len(other_TD) :])
    assert np.concatenate(pieces).tobytes() == whole.tobytes()


@pytest.mark.parametrize(
    ("places", "lengths", "code"),
    [
        ([place(NOBODY)], [4], WRONG),
        ([place(b"")], [4], WRONG),
        ([place(A[:15])], [4], WRONG),
        ([place(A, epoch=1)], [4], WRONG),
        ([place(A, epoch=-1)], [4], WRONG),
        ([place(A, position=11)], [4], WRONG),
        ([place(A, position=-1)], [4], INVALID),
        ([place(A, position=2**31 - 1)], [4], INVALID),
        ([place(A, position=297)], [4], INVALID),
        ([place(A), place(A, position=10)], [2, 2], INVALID),
        ([], [4], INVALID),
        ([place(A), place(B)], [4], INVALID),
        ([place(A)], [2, 2], INVALID),
        ([place(A)], [5], INVALID),
        ([place(A)], [0], INVALID),
        ([place(A)], [-4], INVALID),
    ],
)
async def test_rows_out_of_place_are_refused(
    gating: Gating, places: list[Place], lengths: list[int], code: grpc.StatusCode
) -> None:
    await gating.open(A)
    await gating.open(B)
    before = await gating.gate(rows(10), [place()])
    assert (await status(gating.gate(rows(4), places, lengths))).code() == code
    assert await gating.gate(rows(10), [place()]) == before


@pytest.mark.parametrize("layer", [-1, LAYERS, 2**31 - 1])
async def test_layers_that_there_are_not_are_refused(gating: Gating, layer: int) -> None:
    await gating.open()
    assert (await status(gating.gate(rows(4), [place()], layer=layer))).code() == WRONG


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
async def test_rows_that_are_not_finite_are_refused_and_not_cached(gating: Gating, value: float) -> None:
    await gating.open()
    poisoned = rows(4)
    poisoned[2, 7] = value
    assert (await status(gating.gate(poisoned, [place()]))).code() == INVALID
    assert (await status(gating.gate(rows(1), [place(position=4)]))).code() == WRONG


async def test_a_later_layer_does_not_have_what_an_earlier_one_has(gating: Gating) -> None:
    await gating.open()
    await gating.gate(rows(4), [place()], layer=0)
    assert (await status(gating.gate(rows(1), [place(position=4)], layer=1))).code() == WRONG


@pytest.mark.parametrize(
    ("sequence", "epoch", "tokens", "code"),
    [
        (b"", 0, 10, INVALID),
        (b"a" * 17, 0, 10, INVALID),
        (A, -1, 10, INVALID),
        (A, 0, 0, INVALID),
        (A, 0, -1, INVALID),
        (A, 0, CONTEXT + 1, INVALID),
        (A, 0, 2**31 - 1, INVALID),
        (B, 0, CONTEXT, FULL),
    ],
)
async def test_what_cannot_be_opened_is_refused(
    gating: Gating, sequence: bytes, epoch: int, tokens: int, code: grpc.StatusCode
) -> None:
    await gating.open(NOBODY, tokens=CONTEXT)
    await gating.open(b"n" * 16, tokens=CONTEXT - 200)
    error = await status(gating.open(sequence, epoch, tokens))
    assert error.code() == code
    if code == FULL:
        assert b"RetryInfo" in dict(error.trailing_metadata() or ())["grpc-status-details-bin"]
        assert error_info(error)["reason"] == "OVERLOADED"
    assert gating.leases.free_blocks == 1


async def test_an_older_epoch_cannot_be_opened(gating: Gating) -> None:
    await gating.open(epoch=2)
    assert (await status(gating.open(epoch=1))).code() == WRONG


async def test_release_frees_at_once_and_passes_over_the_unknown(gating: Gating) -> None:
    await gating.open(A)
    await gating.open(B)
    assert gating.leases.free_blocks == 2
    reply = await gating.stub.Release(ReleaseRequest(sequences=[A, NOBODY, b"", B, A]))
    assert reply.released == 2
    assert gating.leases.free_blocks == 8
    assert (await status(gating.gate(rows(4), [place(A)]))).code() == WRONG


async def test_gating_of_a_model_that_classifies_has_no_cache() -> None:
    servicer = GatingServicer(tiny.stage("gating"))
    async with (
        tiny.served((add_GatingServiceServicer_to_server, servicer)) as address,
        open_channel(address) as channel,
    ):
        stub = GatingServiceStub(channel)
        assert (await status(stub.Open(OpenRequest(sequence=A, tokens=3)))).code() == WRONG
        assert (await status(stub.Release(ReleaseRequest(sequences=[A])))).code() == WRONG
        request = GateRequest(rows=wire.encode(tiny.random_rows(4)), lengths=tiny.wire_ids(4), places=[place()])
        assert (await status(stub.Gate(request))).code() == INVALID
