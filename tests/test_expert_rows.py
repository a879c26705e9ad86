from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import torch

from expertmesh import wire
from expertmesh.model.arrays import to_torch
from expertmesh.rpc.channel import open_channel
from expertmesh.v1.expert_pb2 import ApplyRequest
from expertmesh.v1.expert_pb2_grpc import ExpertServiceStub, add_ExpertServiceServicer_to_server
from services.expert.bank import Rows
from services.expert.service import ExpertServicer
from tests import tiny
from tests.generating import model

WIDTH = 64
CPU = torch.device("cpu")
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.fixture(params=["float32", "bfloat16"])
async def expert(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Any, ExpertServicer, torch.dtype]]:
    """Expert 3 of layer 1 of a model in either dtype: a stub, the servicer and the dtype."""
    servicer = ExpertServicer(tiny.stage("expert", model(dtype=request.param)), [(1, 3)])
    add = add_ExpertServiceServicer_to_server
    async with tiny.served((add, servicer)) as address, open_channel(address) as channel:
        yield ExpertServiceStub(channel), servicer, TORCH[request.param]


def rows(name: str, scale: float = 1.0) -> np.ndarray:
    wide = scale * np.random.default_rng(4).standard_normal((7, WIDTH)).astype(np.float32)
    return wire.narrow(wide, wire.ROW_DTYPES[name])


def asked(array: np.ndarray) -> ApplyRequest:
    return ApplyRequest(layer=1, experts=[3], counts=[len(array)], rows=wire.encode(array))


@pytest.mark.parametrize("name", TORCH)
async def test_rows_come_back_as_they_came(expert: tuple[Any, ExpertServicer, torch.dtype], name: str) -> None:
    stub, servicer, dtype = expert
    array = rows(name)
    reply = await stub.Apply(asked(array))
    with torch.inference_mode():
        computed = servicer.bank.pair2expert[1, 3](to_torch(array, CPU).to(dtype))
    given = wire.decode_rows(reply.rows, array.shape, "rows")
    assert given.dtype == wire.ROW_DTYPES[name]
    assert wire.widen(given).tobytes() == computed.to(TORCH[name]).float().numpy().tobytes()


async def test_what_the_expert_makes_too_large_for_float16_comes_back_wider(
    expert: tuple[Any, ExpertServicer, torch.dtype],
) -> None:
    stub, _, dtype = expert
    array = rows("float16", scale=15_000)
    reply = await stub.Apply(asked(array))
    given = wire.decode_rows(reply.rows, array.shape, "rows")
    assert np.abs(wire.widen(given)).max() > 65504
    assert given.dtype == {torch.float32: wire.FLOAT32, torch.bfloat16: wire.BFLOAT16}[dtype]


@pytest.mark.parametrize("name", TORCH)
async def test_rows_that_are_not_finite_are_refused(expert: tuple[Any, ExpertServicer, torch.dtype], name: str) -> None:
    wide = torch.ones(2, WIDTH)
    wide[1, 5] = torch.inf
    bits = wide.to(TORCH[name]).view(torch.int32 if name == "float32" else torch.int16).numpy()
    with pytest.raises(grpc.aio.AioRpcError, match="not finite") as refused:
        await expert[0].Apply(asked(bits.view(wire.ROW_DTYPES[name])))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_call_gets_the_same_bytes_whatever_runs_with_it(
    expert: tuple[Any, ExpertServicer, torch.dtype],
) -> None:
    bank = expert[1].bank
    small, large = (Rows([3], [7], rows("float16", scale)) for scale in (1.0, 15_000))
    with torch.inference_mode():
        alone = [bank.apply(1, [call])[0] for call in (small, large)]
        together = bank.apply(1, [small, large])
    assert [one.dtype for one in together] == [one.dtype for one in alone]
    assert alone[0].dtype == wire.FLOAT16 != alone[1].dtype
    assert [one.tobytes() for one in together] == [one.tobytes() for one in alone]
