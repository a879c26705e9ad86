"""Shared experts that run while the routed ones do: one more call a layer, and the same bits."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from expertmesh.errors import InvalidInput
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.gating_pb2 import ShareRequest
from expertmesh.v1.gating_pb2_grpc import GatingServiceServicer
from tests.generating import answers_of, asked, model
from tests.small_mesh import small_mesh
from tests.tiny import wire_ids


class Counting(GatingServiceServicer):
    """Passes everything on; remembers of which layers shared experts were asked, and whether gating left them out."""

    def __init__(self, gating: Any) -> None:
        self._gating = gating
        self.shared_layers: list[int] = []
        self.left_out: set[bool] = set()
        self.Open, self.Release = gating.Open, gating.Release

    async def Gate(self, request: Any, context: Any) -> Any:
        self.left_out.add(request.shared_apart)
        return await self._gating.Gate(request, context)

    async def Share(self, request: Any, context: Any) -> Any:
        self.shared_layers.append(request.layer)
        return await self._gating.Share(request, context)


@pytest.mark.parametrize("apart", ["on", "off", "auto"])
async def test_tokens_and_their_probabilities_are_the_same_either_way(apart: str) -> None:
    counting: list[Counting] = []

    def wrap(gating: Any) -> Counting:
        counting.append(Counting(gating))
        return counting[0]

    requests = [asked(length, 6, logprobs=2) for length in (3, 40, 150)]
    async with small_mesh(model("deepseek_v3"), {"gating": wrap}, shared_apart=apart) as mesh:
        answers = await asyncio.gather(*map(mesh.client.complete, requests))
        for request, answer in zip(requests, answers, strict=True):
            assert [choice.route for choice in answer.choices] == [pb.ROUTE_MESH]
            assert answer.choices[0].exact
            request.route = pb.ROUTE_FULL_MODEL
            assert answers_of(answer) == answers_of(await mesh.client.complete(request))
        spec = mesh.programs["gateway"].servicers[0].implementation._spec
    assert spec.dense.shared_width > 0
    assert counting[0].left_out == {apart == "on"}
    assert set(counting[0].shared_layers) == (set(spec.sparse_layers) if apart == "on" else set())


async def test_a_layer_without_shared_experts_and_rows_of_another_width_are_refused() -> None:
    async with small_mesh(model("deepseek_v3")) as mesh:
        gating = mesh.programs["gating"].servicers[0].implementation
        dense = next(iter(mesh.programs["gateway"].servicers[0].implementation._spec.dense.layers))
        with pytest.raises(Exception, match="no shared experts"):
            await gating.Share(ShareRequest(layer=dense), None)
        with pytest.raises(Exception, match="no shared experts"):
            await gating.Share(ShareRequest(layer=10**6), None)
        with pytest.raises(InvalidInput, match="rows"):
            await gating.Share(ShareRequest(layer=dense + 1, rows=wire_ids(1, 2)), None)
