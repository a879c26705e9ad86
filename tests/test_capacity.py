import asyncio
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.capacity import (
    BFLOAT16,
    FLOAT32,
    MODELS,
    NARROWED,
    SOCKETS,
    STREAMS,
    Cost,
    Dtypes,
    Model,
    expert_traffic,
    gateway_tokens_per_s,
    gateways,
    gating_traffic,
    nic_tokens_per_s,
    rewritten,
    services_reached,
    step_calls,
    tables,
    token_traffic,
)
from expertmesh import wire
from expertmesh.dispatch import drive_async, layer_loop
from expertmesh.rpc.alarms import Alarms
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.link.reply import Reply
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas.asked import Asked
from expertmesh.rpc.replicas.sent import Sent
from expertmesh.v1.classifier_pb2 import Draw, SampleResponse
from expertmesh.v1.embedding_pb2 import EmbedResponse
from expertmesh.v1.expert_pb2 import ApplyResponse
from expertmesh.v1.gating_pb2 import GateResponse
from expertmesh.v1.sampling_pb2 import TokenLogprobs
from services.gateway.stage_calls import StageCalls

ROOT = Path(__file__).parents[1]
MIXTRAL, OLMOE, QWEN, LITE, GPT_OSS = MODELS
SMALL = Model("small", 3, 1, 16, 6, 2, 24)  # the first layer is dense


class CountingMesh:
    """Services that answer with zeros and count the numbers in messages; token t goes to experts t and t + 1."""

    def __init__(self, model: Model, services: int, dtypes: Dtypes) -> None:
        self.model, self.services = model, services
        self.own = wire.FLOAT32 if dtypes.model_bytes == 4 else wire.BFLOAT16
        self.wire_dtype = wire.FLOAT32 if dtypes.wire_bytes == 4 else wire.BFLOAT16
        self.narrows = dtypes is NARROWED
        self.manifest = SimpleNamespace(
            spec=SimpleNamespace(
                width=model.width,
                layers=model.layers,
                router=SimpleNamespace(top_k=model.top_k, experts=model.experts),
                dense=SimpleNamespace(layers=set(range(model.dense_layers))),
                embedding=SimpleNamespace(vocab=100),
                residual_multiplier=1.0,
            )
        )
        self.message_rows = self.message_bytes = 2**20
        self.embedding = self.gating = self.classifier = self.holders = self
        self.alarms = Alarms()
        self.calls = self.out_bytes = self.in_bytes = 0
        self.experts = [_Service(self) for _ in range(services)]

    def of(self, layer: int, expert: int) -> Any:
        return self.experts[expert * self.services // self.model.experts]

    def digest(self, layer: int, expert: int) -> bytes:
        return bytes(32)

    async def call(self, method: str, request: Any, deadline: Deadline, read: Any, at: Any = None) -> Any:
        return read(self.reply(method, request), Origin("", ""))

    def reply(self, method: str, request: Any) -> Any:
        rows = request.ids if method == "Embed" else request.rows
        reply = getattr(self, f"_{method.lower()}")(request, rows.shape[0])
        self.calls += 1
        self.out_bytes += 0 if method == "Embed" else len(request.rows.data)
        self.in_bytes += sum(len(value.data) for _, value in reply.ListFields() if hasattr(value, "data"))
        return reply

    def _embed(self, request: Any, rows: int) -> EmbedResponse:
        return EmbedResponse(rows=wire.encode(np.zeros((rows, self.model.width), np.float32)))

    def _gate(self, request: Any, rows: int) -> GateResponse:
        residual = wire.encode(np.zeros((rows, self.model.width), np.float32))
        if request.layer < self.model.dense_layers:
            return GateResponse(residual=residual)
        ids_TK = np.arange(rows, dtype=np.int32)[:, None] + np.arange(self.model.top_k, dtype=np.int32)
        return GateResponse(
            residual=residual,
            expert_input=wire.encode(wire.narrow(np.zeros((rows, self.model.width), np.float32), self.own)),
            expert_ids=wire.encode(ids_TK),
            weights=wire.encode(np.zeros(ids_TK.shape, np.float32)),
        )

    def _apply(self, request: Any, rows: int) -> ApplyResponse:
        digests = [bytes(32)] * len(request.experts)
        return ApplyResponse(layer=request.layer, experts=request.experts, digests=digests, rows=request.rows)

    def _sample(self, request: Any, rows: int) -> SampleResponse:
        return SampleResponse(tokens=[TokenLogprobs(id=1)] * rows)


class _Service:
    live = True

    def __init__(self, mesh: CountingMesh) -> None:
        self._mesh = mesh

    def begin(self, method: str, request: Any, deadline: Deadline, read: Any) -> Asked[Any]:
        asked = Asked(method, request, deadline, read, None, None)
        asked.sent = Sent(Reply(), Origin("", ""), 1, 1)
        asked.sent.reply.settle(self._mesh.reply(method, request))
        return asked

    def take(self, asked: Asked[Any]) -> Any:
        assert asked.sent is not None
        return asked.read(asked.sent.reply.message, asked.sent.origin)

    async def finish(self, asked: Asked[Any]) -> Any:
        return self.take(asked)


@pytest.mark.parametrize("dtypes", [FLOAT32, NARROWED, BFLOAT16], ids=lambda dtypes: dtypes.name)
@pytest.mark.parametrize(("rows", "services", "reached"), [(1, 6, 2), (4, 6, 5), (4, 2, 2), (1, 2, 1)])
def test_bytes_and_calls_are_those_of_the_gateway(dtypes: Dtypes, rows: int, services: int, reached: int) -> None:
    mesh = CountingMesh(SMALL, services, dtypes)
    calls = StageCalls(mesh, Deadline.after(60))

    async def step() -> None:
        ids_T, lengths_B = np.ones(rows, np.int32), np.ones(rows, np.int32)
        x_TD = await drive_async(layer_loop(mesh.manifest.spec, ids_T, lengths_B), calls.answer)
        await calls.sample(x_TD, [Draw(logprobs=-1)] * rows)

    asyncio.run(step())
    traffic = token_traffic(SMALL, dtypes)
    assert (mesh.out_bytes, mesh.in_bytes) == (rows * traffic.out_bytes, rows * traffic.in_bytes)
    assert mesh.calls == 2 + 3 + 2 * reached


def test_bytes_by_hand() -> None:
    assert (gating_traffic(MIXTRAL, FLOAT32).out_bytes, gating_traffic(MIXTRAL, FLOAT32).in_bytes) == (16384, 32784)
    assert gating_traffic(MIXTRAL, BFLOAT16).in_bytes == 16384 + 8192 + 2 * 8
    assert gating_traffic(MIXTRAL, NARROWED).in_bytes == 32784
    assert expert_traffic(QWEN, FLOAT32).in_bytes == 8 * 2048 * 4
    assert expert_traffic(QWEN, NARROWED).out_bytes == 8 * 2048 * 2
    out = 32 * (16384 + 32768) + 16384
    assert token_traffic(MIXTRAL, FLOAT32).out_bytes == out
    # 26 layers with experts, one without, and the embedding
    assert token_traffic(LITE, BFLOAT16).in_bytes == 26 * (8192 + 4096 + 48 + 6 * 4096) + 8192 + 8192


@pytest.mark.parametrize(
    ("model", "services", "rows", "reached"),
    [
        (MIXTRAL, 8, 1, 2.0),  # each of two experts in a service of its own
        (MIXTRAL, 8, 16, 8 * (1 - 0.75**16)),
        (MIXTRAL, 1, 1, 1.0),
        (SMALL, 3, 1, 3 * (1 - 6 / 15)),  # two of the four elsewhere, of the fifteen pairs
        (SMALL, 4, 1, 2 * (1 - 10 / 15) + 2 * (1 - 6 / 15)),  # 1, 2, 1 and 2 experts
    ],
)
def test_services_reached_by_hand(model: Model, services: int, rows: int, reached: float) -> None:
    assert services_reached(model, services, rows) == pytest.approx(reached)


def test_services_reached_against_draws() -> None:
    rng = np.random.default_rng(0)
    steps = [{e // 8 for _ in range(4) for e in rng.choice(64, 8, replace=False)} for _ in range(2000)]
    assert services_reached(OLMOE, 8, 4) == pytest.approx(np.mean([len(step) for step in steps]), abs=0.02)


def test_hops_and_calls_by_hand() -> None:
    assert [model.hops for model in MODELS] == [66, 34, 98, 55, 50]
    assert step_calls(MIXTRAL, 8, 1) == 2 + 32 + 32 * 2
    assert step_calls(GPT_OSS, 32, 1) == pytest.approx(2 + 24 + 24 * 4)


def test_a_core_a_cluster_and_a_nic_by_hand() -> None:
    cost = Cost("any", call_ms=0.5, kib_us=2.0)
    kib = (32 * (49152 + 65552) + 2 * 16384) / 1024
    assert gateway_tokens_per_s(MIXTRAL, FLOAT32, cost, 8, 1) == pytest.approx(1000 / (98 * 0.5 + kib * 0.002))
    assert gateways(700, 100) == 10
    assert gateways(701, 100) == 11
    assert nic_tokens_per_s(MIXTRAL, FLOAT32, 25) == pytest.approx(0.9 * 25e9 / 8 / (32 * 65552 + 16384))


def test_memory_agrees_with_published_sizes() -> None:
    published = [45.1, 6.4, 29.0, 14.4, 19.1]  # billions of expert weights
    assert [round(model.expert_weights / 1e9, 1) for model in MODELS] == published


def test_the_page_has_the_tables_of_the_script() -> None:
    page = (ROOT / "docs" / "capacity.md").read_text()
    assert rewritten(page, tables((SOCKETS, STREAMS))) == page
    with pytest.raises(ValueError, match="0 places"):
        rewritten(page, {"no such table": [["head"]]})


@pytest.mark.parametrize("command", [["-m", "benchmarks.capacity"], ["benchmarks/capacity.py"]])
def test_it_takes_costs_and_needs_no_torch(command: list[str]) -> None:
    run = [sys.executable, "-X", "importtime", *command, "--call-ms", "0.125", "--kib-us", "7"]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "yours" in done.stdout
    assert "0.125" in done.stdout
    assert "torch" not in done.stderr
    half = subprocess.run(run[:-2], cwd=ROOT, capture_output=True, text=True)
    assert half.returncode == 2
