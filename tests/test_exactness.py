from __future__ import annotations

import random
import shutil
from pathlib import Path

import grpc.aio
import pytest

from expertmesh.client import Client
from expertmesh.errors import InvalidInput
from expertmesh.v1.fault_pb2 import ChangeWeightRequest
from expertmesh.v1.fault_pb2_grpc import FaultServiceStub
from expertmesh.v1.inference_pb2 import ROUTE_FULL_MODEL, ROUTE_MESH
from expertmesh.verification import compare
from tests.up import Up, run

FILE_TEXTS = 96  # every expert of the model gets rows of them, in several calls at once
WORDS = " ".join(
    [
        "the oil price striker goal minister treaty chip software U.S. $46 3-2 &lt;b&gt; quot; é 中 — report said",
        "of in on shares season satellite army growth medal virus bank court launch",
    ]
).split()


@pytest.fixture(scope="module")
def texts() -> list[str]:
    chance = random.Random(7)
    return [" ".join(chance.choices(WORDS, k=chance.randint(1, 300))) for _ in range(200)]


@pytest.fixture(scope="module")
def texts_file(texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inputs") / "texts.txt"
    path.write_text("\n".join(texts[:FILE_TEXTS]) + "\n")
    return path


@pytest.mark.parametrize(("call_texts", "callers"), [(1, 16), (7, 1), (64, 16)])
async def test_mesh_and_full_model_are_bit_equal_whatever_shares_a_call(
    client: Client, texts: list[str], call_texts: int, callers: int
) -> None:
    result = await compare(client, texts, call_texts, callers, lambda done: None)
    assert (result.texts, result.differing, result.inexact) == (len(texts), [], 0)


async def test_an_answer_does_not_depend_on_the_call_it_came_in(client: Client, texts: list[str]) -> None:
    together = await client.classify(texts[:64])
    alone = [(await client.classify([text])).results[0] for text in texts[:64]]
    assert [list(a.logits) for a in alone] == [list(b.logits) for b in together.results]


@pytest.mark.parametrize("services", [1, 3])
def test_verify_finds_no_difference_for_experts_spread_otherwise(model: Path, texts_file: Path, services: int) -> None:
    ended = run("verify", model, "--inputs", texts_file, "--expert-services", services, "--call-texts", 16)
    assert ended.returncode == 0, ended.stderr
    assert f"differ              0 of {FILE_TEXTS}" in ended.stdout


def test_verify_names_layer_and_expert_of_a_weight_changed_in_memory(model: Path, texts_file: Path) -> None:
    with Up(model, "--inspect", "--faults", "--expert-services", "4") as up:
        address = up.processes()["experts-4-5.0"]["address"]
        with grpc.insecure_channel(address) as channel:
            FaultServiceStub(channel).ChangeWeight(ChangeWeightRequest(layer=1, expert=5, delta=0.5), timeout=10)
        ended = run("verify", model, "--inputs", texts_file, "--address", up.grpc)
    assert ended.returncode == 1
    assert "expert 5 of layer 1" in ended.stdout
    assert "differ              0 of" not in ended.stdout


def test_a_service_refuses_a_changed_weight_file(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "model"
    shutil.copytree(model, broken)
    part = broken / "experts" / "layer-01" / "expert-05.safetensors"
    data = bytearray(part.read_bytes())
    data[-1] ^= 1
    part.write_bytes(data)
    ended = run("verify", broken)
    assert ended.returncode == 2
    assert any(
        f"{name}.0 could not start" in ended.stderr for name in ("expert-5", "full_model")
    )  # whoever sees it first
    assert "part experts/layer-01/expert-05: the SHA-256" in ended.stderr


async def test_inspection_shows_the_same_bits_on_both_routes(client: Client, headlines: list[str]) -> None:
    mesh = await client.inspect(headlines[0], ROUTE_MESH)
    full = await client.inspect(headlines[0], ROUTE_FULL_MODEL)
    assert mesh == full
    assert len(mesh.layers) == 2
    answer = (await client.classify([headlines[0]])).results[0]
    assert mesh.logits.data == _floats(answer.logits)


async def test_inspection_refuses_empty_text(client: Client) -> None:
    with pytest.raises(InvalidInput):
        await client.inspect("  ", ROUTE_MESH)


def _floats(values: object) -> bytes:
    import numpy as np

    return np.array(list(values), "<f4").tobytes()  # type: ignore[call-overload]
