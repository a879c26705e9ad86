from __future__ import annotations

import functools
import io
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from expertmesh.checkpoint.load import StageLoader
from expertmesh.checkpoint.split import split
from expertmesh.dispatch import Score, Scores
from expertmesh.errors import SetupError
from expertmesh.model.full import FullModel
from expertmesh.model.spec import ModelSpec
from expertmesh.serving.inspection import Trace
from expertmesh.v1.inspection_pb2 import InspectResponse
from expertmesh.verification.agreement import Agreement, Computed, agreement
from expertmesh.verification.reference import Reference
from tests import tiny
from tests.conftest import ROOT

FIXTURE = ROOT / "tests" / "fixtures" / "checkpoints" / "deepseek_v3"
TOLERANCE = 2e-4
Arrays = dict[str, np.ndarray]
Change = Callable[[Arrays], None]


@functools.cache
def model(dtype: str = "float32") -> FullModel:
    folder = tiny.scratch() / "deepseek_v3"
    split(FIXTURE, folder, dtype=dtype)
    return StageLoader(folder, torch.device("cpu")).full_model()


@functools.cache
def traces(dtype: str = "float32") -> list[InspectResponse]:
    found = []
    for ids in arrays()["input_ids"]:
        trace = Trace()
        with torch.inference_mode():
            ids_T = torch.tensor(ids)
            logits_TV = model(dtype).logits(ids_T, torch.tensor([len(ids)]), trace.observe)
        trace.observe(Score(None, None), Scores(logits_TV, None))
        found.append(trace.response)
    return found


def arrays() -> Arrays:
    with np.load(FIXTURE / "reference.npz") as loaded:
        return dict(loaded)


def written(folder: Path, changed: Arrays) -> Path:
    np.savez(folder / "reference.npz", **changed)
    return folder / "reference.npz"


def judged(folder: Path, change: Change, dtype: str = "float32") -> Agreement:
    changed = arrays()
    change(changed)
    spec = model(dtype).spec
    reference = Reference.read(written(folder, changed), spec)
    generated = arrays()["generated"][:, 32:].tolist()
    return agreement(spec, reference, Computed.of_traces(spec, traces(dtype), generated))


def set_(name: str, index: tuple[int, ...], value: float) -> Change:
    def change(changed: Arrays) -> None:
        changed[name][index] = value

    return change


def add(name: str, index: tuple[int, ...], value: float) -> Change:
    def change(changed: Arrays) -> None:
        changed[name][index] += value

    return change


def test_what_transformers_computed_agrees(tmp_path: Path) -> None:
    found = judged(tmp_path, lambda changed: None)
    assert found.faults(TOLERANCE) == []
    assert found.routes == (192, 192)
    assert (found.equal_tokens, found.tokens) == (64, 64)
    assert [layer.tokens for layer in found.layers] == [0, 64, 64, 64]
    assert 0 < found.logits < TOLERANCE
    assert 0 < found.hidden < TOLERANCE


def test_the_order_of_a_token_s_experts_does_not_matter(tmp_path: Path) -> None:
    def reverse(changed: Arrays) -> None:
        for name in ("route_0_index", "route_0_weight"):
            changed[name] = changed[name][:, ::-1]

    assert judged(tmp_path, reverse).faults(TOLERANCE) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (add("logits", (1, 31, 0), -4e-4), "logits differ by 0.000"),
        (add("hidden_states", (3, 0, 7, 5), 3e-4), "hidden states differ by 0.0003"),
        (add("hidden_states", (0, 0, 0, 0), 3e-4), "hidden states differ by 0.0003"),
        (add("route_2_weight", (63, 1), 3e-4), "router weights differ by 0.0003"),
        (lambda changed: changed["route_0_index"][9:10].fill(7), "1 of 192 routes differ"),
        (set_("generated", (1, 63), 5), "1 of 64 greedy tokens differ"),
    ],
)
def test_what_disagrees_is_named_and_nothing_else(change: Change, fault: str, tmp_path: Path) -> None:
    assert [found[: len(fault)] for found in judged(tmp_path, change).faults(TOLERANCE)] == [fault]


def test_the_last_hidden_state_is_not_looked_at(tmp_path: Path) -> None:
    assert judged(tmp_path, add("hidden_states", (4, 0, 0, 0), 1.0)).faults(TOLERANCE) == []


def test_bfloat16_is_judged_by_distributions_where_no_flip_reaches(tmp_path: Path) -> None:
    found = judged(tmp_path, lambda changed: None, "bfloat16")
    assert found.logits > 0.1, "or there would be no need for other measures"
    assert found.faults(TOLERANCE) == []


@pytest.mark.parametrize(
    ("layer", "token", "judged_tokens"),
    [(0, 32 + 20, 32 + 20), (1, 5, 5 + 32), (2, 32 + 20, 63)],
)
def test_a_flip_touches_its_token_and_where_attention_follows_all_later_ones(
    layer: int, token: int, judged_tokens: int, tmp_path: Path
) -> None:
    """Sequences have 32 tokens; the third layer that has experts is the last of all."""

    def flip(changed: Arrays) -> None:
        row = changed[f"route_{layer}_index"][token]
        row[:] = sorted(set(range(8)) - set(row))[:2]

    assert judged(tmp_path, flip).likeness.tokens == judged_tokens


def test_in_bfloat16_a_weight_that_jumps_is_a_flip(tmp_path: Path) -> None:
    before = judged(tmp_path, lambda changed: None, "bfloat16").routes[0]
    assert judged(tmp_path, add("route_2_weight", (0, 0), 3.0), "bfloat16").routes[0] == before - 1


def test_bfloat16_measures_see_what_they_are_for(tmp_path: Path) -> None:
    found = judged(tmp_path, lambda changed: None)  # near zero, so that each fault below is the only one
    found.spec = replace(found.spec, dtype="bfloat16")
    assert found.faults(TOLERANCE) == []
    for field, value, fault in (
        ("divergence", 0.04, "mean divergence"),
        ("cosine", 0.97, "cosine"),
        ("top_1", 0.8, "top-1"),
    ):
        found.likeness = replace(judged(tmp_path, lambda changed: None).likeness, **{field: value})
        assert [one[: len(fault)] for one in found.faults(TOLERANCE)] == [fault]


def test_bfloat16_with_all_routes_wrong_has_no_rows_left_and_fails(tmp_path: Path) -> None:
    def roll(changed: Arrays) -> None:
        for number in range(3):
            changed[f"route_{number}_index"] = (changed[f"route_{number}_index"] + 1) % 8

    found = judged(tmp_path, roll)
    found.spec = replace(found.spec, dtype="bfloat16")
    assert any("routes flipped" in fault for fault in found.faults(TOLERANCE))


def test_likeness_is_that_of_the_definitions(tmp_path: Path) -> None:
    def shift(changed: Arrays) -> None:
        changed["logits"] = changed["logits"] + 5.0  # which no distribution sees

    like = judged(tmp_path, shift).likeness
    assert like.divergence == pytest.approx(0, abs=1e-6)
    assert like.top_1 == 1.0
    assert like.cosine < 0.95

    def flip(changed: Arrays) -> None:
        changed["logits"] = -changed["logits"]

    like = judged(tmp_path, flip).likeness
    assert like.cosine == pytest.approx(-1, abs=1e-6)
    assert like.top_1 == 0.0
    assert like.divergence > 1


def spec() -> ModelSpec:
    return model().spec


def drop(name: str) -> Change:
    def change(changed: Arrays) -> None:
        del changed[name]

    return change


def put(name: str, value: object) -> Change:
    return lambda changed: changed.update({name: np.asarray(value)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop("logits"), "there is no array logits"),
        (drop("route_2_weight"), "there is no array route_2_weight"),
        (drop("generated"), "there is no array generated"),
        (set_("input_ids", (0, 0), 512), r"input_ids must be in \[0, 512\)"),
        (set_("input_ids", (0, 0), -1), r"input_ids must be in \[0, 512\)"),
        (set_("route_0_index", (0, 0), 8), r"route_0_index must be in \[0, 8\)"),
        (set_("logits", (0, 0, 0), np.nan), "logits holds values that are not finite"),
        (set_("hidden_states", (1, 0, 0, 0), np.inf), "hidden_states holds values that are not finite"),
        (set_("generated", (0, 0), 3), "generated does not begin with input_ids"),
        (put("generated", np.zeros((2, 32), np.int64)), "generated has 32 tokens"),
        (put("generated", np.zeros((2, 600), np.int64)), "generated has 600 tokens"),
        (put("logits", np.zeros((2, 32, 511), np.float32)), r"logits has shape \[2, 32, 511\], .* \[2, 32, 512\]"),
        (put("logits", np.zeros((2, 32, 512), np.int32)), "logits must be floating-point numbers, not int32"),
        (put("input_ids", np.zeros((2, 32), np.float32)), "input_ids must be integers, not float32"),
        (put("input_ids", np.zeros(32, np.int64)), r"input_ids has shape \[32\], this model needs \[\?, \?\]"),
        (put("input_ids", np.zeros((0, 32), np.int64)), "input_ids are 0 sequences"),
        (put("input_ids", np.zeros((1, 0), np.int64)), "sequences of 0 tokens"),
        (put("input_ids", np.zeros((1, 512), np.int64)), "sequences of 512 tokens; the context is 512"),
        (put("logits", np.array([{"a": 1}], object)), "logits must be floating-point numbers, not object"),
    ],
)
def test_an_archive_that_is_not_what_it_should_be_is_refused(change: Change, message: str, tmp_path: Path) -> None:
    changed = arrays()
    change(changed)
    with pytest.raises(SetupError, match=message):
        Reference.read(written(tmp_path, changed), spec())


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "reference.npz"
    with pytest.raises(SetupError, match="cannot be read"):
        Reference.read(path, spec())
    whole = (FIXTURE / "reference.npz").read_bytes()
    for data in (b"", b"\x80\x04pickle", whole[: len(whole) // 2], whole[:100] + bytes(200) + whole[300:]):
        path.write_bytes(data)
        with pytest.raises(SetupError):
            Reference.read(path, spec())


def with_member(folder: Path, name: str, data: bytes) -> Path:
    """The fixture's archive with other bytes in one member."""
    path = folder / "reference.npz"
    with zipfile.ZipFile(FIXTURE / "reference.npz") as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, data if info.filename == f"{name}.npy" else old.read(info))
    return path


@pytest.mark.parametrize("shape", ["(2, 32, 512)", "(2000000000, 2000000000, 2000000000)", "(-1, 32, 512)"])
def test_a_size_that_is_only_claimed_is_refused_before_memory_is_taken(shape: str, tmp_path: Path) -> None:
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".encode()
    data = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(64)
    with pytest.raises(SetupError):
        Reference.read(with_member(tmp_path, "logits", data), spec())


@pytest.mark.parametrize("data", [b"", b"\x93NUMPY", b"\x93NUMPY\x09\x09" + bytes(40), b"\x80\x04\x95" + bytes(40)])
def test_a_member_that_is_no_array_is_refused(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="logits is no NumPy array"):
        Reference.read(with_member(tmp_path, "logits", data), spec())


def test_a_pickle_in_an_object_array_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"

    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return (marker.touch, ())

    buffer = io.BytesIO()
    np.save(buffer, np.array([Evil()], object), allow_pickle=True)
    with pytest.raises(SetupError, match="not object"):
        Reference.read(with_member(tmp_path, "logits", buffer.getvalue()), spec())
    assert not marker.exists()


def test_order_and_width_of_the_stored_numbers_do_not_matter(tmp_path: Path) -> None:
    def convert(changed: Arrays) -> None:
        changed["logits"] = np.asfortranarray(changed["logits"].astype(">f8"))
        changed["input_ids"] = changed["input_ids"].astype(">i4")

    assert judged(tmp_path, convert).faults(TOLERANCE) == []
