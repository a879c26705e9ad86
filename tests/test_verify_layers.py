from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from expertmesh.checkpoint.manifest import Manifest, model_parts
from expertmesh.checkpoint.split import split
from expertmesh.errors import BadCheckpoint
from expertmesh.verification.agreement import agreement
from expertmesh.verification.forced import ForcedPass
from expertmesh.verification.layerwise import prove
from expertmesh.verification.originals import Proof
from expertmesh.verification.reference import Reference
from tests import families, tiny
from tests.conftest import ROOT
from tests.up import run

FIXTURE = ROOT / "tests" / "fixtures" / "checkpoints" / "deepseek_v3"


def proof(folder: Path, original: Path) -> Proof:
    return prove(folder, original, lambda part, done, total: None)


def faults(found: Proof) -> list[str]:
    return [*found.spec_faults, *(fault for place in found.places.values() for fault in place.faults)]


@pytest.fixture
def out(tmp_path: Path) -> Path:
    split(FIXTURE, tmp_path / "out")
    return tmp_path / "out"


def damage(folder: Path, part: str, tensor: str, index: int, tells: bool = True) -> None:
    """Changes one element of a tensor by its last bit, and adapts the manifest."""
    manifest = Manifest.read(folder)
    path = folder / manifest.parts[part].file
    tensors = safetensors.torch.load_file(path)
    flat = tensors[tensor].view(-1)
    flat.view(torch.int32)[index] ^= 1
    data = safetensors.torch.save(tensors)
    path.write_bytes(data)
    if tells:
        parts = manifest.parts | {part: replace(manifest.parts[part], digest=sha256(data).digest())}
        replace(manifest, parts=parts).write(folder)


@pytest.mark.parametrize(("name", "layout"), families.ALL)
def test_a_split_is_its_original_in_every_family_and_layout(name: str, layout: str) -> None:
    found = proof(families.model(name, layout), families.checkpoint(name, layout))
    assert faults(found) == []
    assert found.are_equal
    spec = Manifest.read(families.model(name, layout)).spec
    assert sum(place.parts for place in found.places.values()) == 1 + len(list(model_parts(spec)))
    assert list(found.places) == ["tokenizer", "embedding", *(f"layer {n}" for n in range(spec.layers)), "head"]
    assert all(place.outputs for place in found.places.values() if place.name != "tokenizer")


def test_a_trained_checkpoint_and_its_split_are_compared_too() -> None:
    assert faults(proof(tiny.model(), tiny.checkpoint())) == []


def test_what_was_split_in_another_dtype_or_context_is_compared_with_that(tmp_path: Path) -> None:
    split(FIXTURE, tmp_path / "out", dtype="bfloat16", context=100)
    assert faults(proof(tmp_path / "out", FIXTURE)) == []


@pytest.mark.parametrize(
    ("part", "tensor", "place"),
    [
        ("embedding", "token.weight", "embedding"),
        ("gating/layer-00", "dense.up.weight", "layer 0"),
        ("gating/layer-03", "kv_up.weight", "layer 3"),
        ("experts/layer-02/expert-05", "down.weight", "layer 2"),
        ("classifier", "norm.weight", "head"),
    ],
)
def test_one_bit_of_one_weight_is_found_though_its_digest_is_right(
    part: str, tensor: str, place: str, out: Path
) -> None:
    damage(out, part, tensor, -1)
    found = proof(out, FIXTURE)
    assert [other.name for other in found.places.values() if other.faults] == [place]
    assert found.places[place].faults[0] == f"{part}: {tensor} has other values than in the original"
    assert not found.are_equal


def test_stages_of_a_damaged_part_compute_otherwise(out: Path) -> None:
    manifest = Manifest.read(out)
    part = "experts/layer-02/expert-05"
    path = out / manifest.parts[part].file
    tensors = safetensors.torch.load_file(path)
    tensors["gate.weight"], tensors["up.weight"] = tensors["up.weight"], tensors["gate.weight"]
    path.write_bytes(safetensors.torch.save(tensors))
    digest = sha256(path.read_bytes()).digest()
    replace(manifest, parts=manifest.parts | {part: replace(manifest.parts[part], digest=digest)}).write(out)
    assert faults(proof(out, FIXTURE))[-1] == f"{part}: stages of both give other bits for the same rows"


@pytest.mark.parametrize("layout", families.LAYOUTS)
@pytest.mark.parametrize(("row", "tensor"), [(2, "gate.weight"), (3, "up.weight")])
def test_a_changed_original_is_found_where_its_layout_says(row: int, tensor: str, layout: str, tmp_path: Path) -> None:
    """In gpt-oss gate and up take turns: an even column of the fused tensor is gate's, an odd one is up's."""
    original = tiny.copy_of(families.checkpoint("gpt_oss", layout), tmp_path / "original")
    (file,) = original.glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    tensors["model.layers.1.mlp.experts.gate_up_proj"][2, 5, row] += 1
    safetensors.torch.save_file(tensors, file, {"format": "pt"})
    found = faults(proof(families.model("gpt_oss", layout), original))
    assert found[0] == f"experts/layer-01/expert-02: {tensor} has other values than in the original"
    assert len([fault for fault in found if "has other values" in fault]) == 1


def test_a_spec_that_is_not_the_original_s_is_named(out: Path) -> None:
    manifest = Manifest.read(out)
    spec = replace(manifest.spec, norm=replace(manifest.spec.norm, eps=1e-6))
    replace(manifest, spec=spec).write(out)
    found = proof(out, FIXTURE)
    assert [fault[:14] for fault in found.spec_faults] == ["spec: norm is "]
    assert not found.are_equal


def test_tokenizer_files_are_compared(out: Path, tmp_path: Path) -> None:
    original = tiny.copy_of(FIXTURE, tmp_path / "original")
    (original / "special_tokens_map.json").write_text("{}")
    config = json.loads((original / "tokenizer_config.json").read_text())
    (original / "tokenizer_config.json").write_text(json.dumps(config) + " ")
    assert faults(proof(out, original)) == [
        "tokenizer/special_tokens_map.json is only in the original",
        "tokenizer/tokenizer_config.json has other bytes than in the original",
    ]


@pytest.mark.parametrize("other", ["mixtral", "qwen3_moe"])
def test_another_model_is_no_original(other: str, out: Path) -> None:
    found = proof(out, FIXTURE.parent / other)
    assert all(found.places[f"layer {number}"].faults for number in range(4))
    assert any(fault.startswith("spec: attention is ") for fault in found.spec_faults)
    backwards = proof(families.model("mixtral"), FIXTURE)
    assert "experts/layer-00/expert-00: down.weight is only in the split" in faults(backwards)


def test_a_part_that_services_would_refuse_is_no_difference_but_an_error(out: Path) -> None:
    damage(out, "gating/layer-01", "router.weight", 0, tells=False)
    with pytest.raises(BadCheckpoint, match="the SHA-256"):
        proof(out, FIXTURE)


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral"])
def test_a_reference_is_compared_without_a_mesh(name: str, tmp_path: Path) -> None:
    original = FIXTURE.parent / name
    split(original, tmp_path / "out")
    ended = run("verify", tmp_path / "out", "--layerwise", original, "--reference", original / "reference.npz")
    assert ended.returncode == 0, ended.stderr
    assert "192 of 192" in ended.stdout
    assert "greedy tokens       64 of 64 equal" in ended.stdout
    assert "the reference agrees within 0.0002" in ended.stdout


def forced(change: Callable[[dict[str, np.ndarray]], None], out: Path, folder: Path) -> list[str]:
    """What disagrees with a changed reference."""
    with np.load(FIXTURE / "reference.npz") as loaded:
        arrays = dict(loaded)
    change(arrays)
    np.savez(folder / "changed.npz", **arrays)
    spec = Manifest.read(out).spec
    reference = Reference.read(folder / "changed.npz", spec)
    one_pass = ForcedPass(reference)
    prove(out, FIXTURE, lambda part, done, total: None, one_pass.sequences, one_pass.observe)
    return agreement(spec, reference, one_pass.computed).faults(2e-4)


def test_one_pass_tells_of_tokens_and_numbers_as_generating_does(out: Path, tmp_path: Path) -> None:
    assert forced(lambda arrays: None, out, tmp_path) == []

    def change_last_token(arrays: dict[str, np.ndarray]) -> None:
        arrays["generated"][0, -1] = (arrays["generated"][0, -1] + 1) % 512

    assert forced(change_last_token, out, tmp_path) == ["1 of 64 greedy tokens differ"]

    def change_hidden(arrays: dict[str, np.ndarray]) -> None:
        arrays["hidden_states"][2, 1, 31, 0] += 4e-4

    (fault,) = forced(change_hidden, out, tmp_path)
    assert fault.startswith("hidden states differ by 0.000")


def test_the_command_tells_by_its_status(out: Path, tmp_path: Path) -> None:
    ended = run("verify", out, "--layerwise", FIXTURE)
    assert ended.returncode == 0, ended.stderr
    assert f"every part of {out} is that of {FIXTURE}, bit by bit" in ended.stdout
    assert "│ layer 3" in ended.stdout
    damage(out, "experts/layer-02/expert-05", "up.weight", 7)
    ended = run("verify", out, "--layerwise", FIXTURE)
    assert ended.returncode == 1
    assert "experts/layer-02/expert-05: up.weight has other values than in the original" in ended.stdout
    assert f"{out} IS NOT {FIXTURE}" in ended.stdout
    original = tiny.copy_of(FIXTURE, tmp_path / "original")
    os.truncate(original / "model.safetensors", 10_000)
    for folder in (original, tmp_path / "absent"):
        ended = run("verify", out, "--layerwise", folder)
        assert ended.returncode == 2
        assert "error: " in ended.stderr
