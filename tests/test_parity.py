"""Checkpoints of other people go through the mesh, and `verify` compares it with what transformers computed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.up import Up, run

CHECKPOINTS = ROOT / "tests" / "fixtures" / "checkpoints"
NAMES = ("deepseek_v3", "mixtral", "olmoe", "qwen3_moe")
REFERENCE_FILE = "reference.npz"
Arrays = dict[str, np.ndarray]


def split(name: str, target: Path) -> Path:
    ended = run("split", CHECKPOINTS / name, target)
    assert ended.returncode == 0, ended.stderr
    return target


def rows(table: str, first: str) -> list[str]:
    """Cells of the table row that begins with a word."""
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("│┃ \n").split("│")]
        if cells[0] == first:
            return cells
    raise AssertionError(f"no row {first!r} in:\n{table}")


@pytest.mark.parametrize("name", NAMES)
def test_mesh_agrees_with_transformers_and_is_bit_equal_to_the_full_model(name: str, tmp_path: Path) -> None:
    out = split(name, tmp_path / name)
    ended = run("verify", out, "--reference", CHECKPOINTS / name / REFERENCE_FILE, "--expert-services", 2)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    for setting in ("whole", "chunks of 5", "token by token"):
        assert rows(ended.stdout, setting) == [setting, "2", "64", "0 of 2", "0", "0"]
    assert rows(ended.stdout, "chunks against whole")[3:5] == ["0 of 4", "0"]
    assert rows(ended.stdout, "generated greedily")[2:5] == ["64", "0 of 2", "0"]
    with np.load(CHECKPOINTS / name / REFERENCE_FILE) as arrays:
        layers = len(arrays["hidden_states"]) - 1
        routed = sum(len(arrays[key]) for key in arrays if re.fullmatch(r"route_\d+_index", key))
    assert rows(ended.stdout, "all")[2] == f"{routed} of {routed}"
    assert all(float(rows(ended.stdout, str(layer))[1]) <= 2e-4 for layer in range(layers))
    logits = re.search(r"max \|Δ logit\| +(\S+);", ended.stdout)
    assert logits
    assert float(logits[1]) <= 2e-4
    assert "greedy tokens       64 of 64 equal" in ended.stdout


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return split("mixtral", tmp_path_factory.mktemp("parity") / "mixtral")


@pytest.fixture(scope="module")
def up(mixtral: Path) -> Iterator[Up]:
    with Up(mixtral, "--inspect", "--expert-services", "2") as started:
        yield started


def change_route(arrays: Arrays) -> None:
    arrays["route_1_index"][33] = sorted(set(range(8)) - set(arrays["route_1_index"][33]))[:2]


def change_logit(arrays: Arrays) -> None:
    arrays["logits"][1, 20, 99] += 3e-4


def change_token(arrays: Arrays) -> None:
    arrays["generated"][0, 40] = (arrays["generated"][0, 40] + 1) % 512


WRONG: list[tuple[Callable[[Arrays], None], str]] = [
    (change_route, "1 of 192 routes differ"),
    (change_logit, "logits differ by 0.000"),
    (change_token, "1 of 64 greedy tokens differ"),
]


@pytest.mark.parametrize("case", range(len(WRONG)))
def test_a_wrong_reference_is_told_by_status_and_name(case: int, mixtral: Path, up: Up, tmp_path: Path) -> None:
    change, fault = WRONG[case]
    with np.load(CHECKPOINTS / "mixtral" / REFERENCE_FILE) as loaded:
        arrays = dict(loaded)
    change(arrays)
    np.savez(tmp_path / "wrong.npz", **arrays)
    ended = run("verify", mixtral, "--reference", tmp_path / "wrong.npz", "--address", up.grpc)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert fault in ended.stdout
    assert ended.stdout.count("disagrees  ") == 1, "only that was changed"
    assert "mesh and full model are bit-equal" in ended.stdout


def test_a_tolerance_may_be_given(mixtral: Path, up: Up) -> None:
    reference = CHECKPOINTS / "mixtral" / REFERENCE_FILE
    ended = run("verify", mixtral, "--reference", reference, "--address", up.grpc, "--tolerance", "1e-9")
    assert ended.returncode == 1
    assert "logits differ by" in ended.stdout


def test_a_reference_of_another_model_is_refused_before_anything_starts(mixtral: Path) -> None:
    ended = run("verify", mixtral, "--reference", CHECKPOINTS / "deepseek_v3" / REFERENCE_FILE)
    assert ended.returncode == 2
    assert "hidden_states has shape [5, 2, 32, 64], this model needs [4, 2, 32, 64]" in ended.stderr


def test_hidden_states_that_are_not_shown_cannot_be_compared(mixtral: Path) -> None:
    with Up(mixtral, "--expert-services", "1") as closed:
        reference = CHECKPOINTS / "mixtral" / REFERENCE_FILE
        ended = run("verify", mixtral, "--reference", reference, "--address", closed.grpc)
        assert ended.returncode == 2
        assert "start it with inspection on" in ended.stderr
        ended = run("verify", mixtral, "--address", closed.grpc, "--max-tokens", 3)
        assert ended.returncode == 0
        assert "were not compared; start the mesh with `expertmesh up --inspect`" in ended.stdout
        assert rows(ended.stdout, "generated greedily")[3:5] == ["0 of 8", "0"]
