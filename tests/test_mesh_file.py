from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.errors import SetupError
from expertmesh.mesh_file import KINDS, MeshFile, Service, parse_experts

MESH = MeshFile(
    "models/tiny",
    (
        Service("tokenizer", "tokenizer", ("unix:/run/tokenizer.sock",)),
        Service("expert-0", "expert", ("127.0.0.1:1", "dns:///expert-0:50051"), experts=("*:0", "1:2")),
        Service("gateway", "gateway", ("127.0.0.1:2",), http="127.0.0.1:3"),
    ),
)
SERVICE = 'name = "gating"\nkind = "gating"\nreplicas = ["127.0.0.1:1"]\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "mesh.toml"
    path.write_text(text)
    return path


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mesh.toml"
    MESH.write(path)
    assert MeshFile.read(path) == MESH
    assert [entry.name for entry in tmp_path.iterdir()] == ["mesh.toml"]


def test_an_earlier_file_is_replaced(tmp_path: Path) -> None:
    path = write(tmp_path, "something else")
    MESH.write(path)
    assert MeshFile.read(path) == MESH


def test_services_are_found_by_kind() -> None:
    assert [service.name for service in MESH.of_kind("expert")] == ["expert-0"]
    assert MESH.of_kind("full_model") == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model = [", "cannot be read"),
        ('model = "m"', "'service' is missing"),
        (f"[[service]]\n{SERVICE}", "'model' is missing"),
        (f'model = "m"\nmodels = 1\n[[service]]\n{SERVICE}', "unknown keys: models"),
        (f'model = "m"\n[[service]]\n{SERVICE}port = 1\n', "port"),
        ('model = "m"\n[[service]]\nname = "gating"\n', "kind"),
        ('model = "m"\nservice = 3\n', "mesh.toml"),
        (f'model = "m"\n[[service]]\n{SERVICE}[[service]]\n{SERVICE}', "same name"),
        (f'model = "m"\n[[service]]\n{SERVICE.replace("gating", "router")}', "unknown kind 'router'"),
        (f'model = "m"\n[[service]]\n{SERVICE}experts = ["*:0"]\n', "experts"),
        ('model = "m"\n[[service]]\nname = "e"\nkind = "expert"\nreplicas = ["a:1"]\n', "experts"),
        ('model = "m"\n[[service]]\nname = "../e"\nkind = "gating"\nreplicas = ["a:1"]\n', "no name of a service"),
        ('model = "m"\n[[service]]\nname = ""\nkind = "gating"\nreplicas = ["a:1"]\n', "no name of a service"),
        ('model = "m"\n[[service]]\nname = "g"\nkind = "gating"\nreplicas = []\n', "no replicas"),
    ],
)
def test_a_file_that_is_not_understood_gives_one_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(SetupError) as caught:
        MeshFile.read(write(tmp_path, text))
    assert reason in str(caught.value)
    assert "mesh" in str(caught.value)


def test_a_service_that_is_no_table_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"mesh\.toml"):
        MeshFile.read(write(tmp_path, 'model = "m"\nservice = ["gating"]\n'))


def test_replicas_are_a_list(tmp_path: Path) -> None:
    text = 'model = "m"\n[[service]]\nname = "g"\nkind = "gating"\nreplicas = "127.0.0.1:1"\n'
    with pytest.raises(SetupError, match="replicas"):
        MeshFile.read(write(tmp_path, text))


def test_a_missing_or_binary_file_gives_one_line(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="cannot be read"):
        MeshFile.read(tmp_path / "mesh.toml")
    (tmp_path / "mesh.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SetupError, match="cannot be read"):
        MeshFile.read(tmp_path / "mesh.toml")


def test_every_kind_can_be_named() -> None:
    for kind in KINDS:
        assert Service("a", kind, ("x:1",), experts=("*:*",) if kind == "expert" else ()).kind == kind


@given(st.sets(st.tuples(st.integers(0, 2), st.integers(0, 3)), min_size=1))
def test_pairs_are_parsed_in_ascending_order(pairs: set[tuple[int, int]]) -> None:
    patterns = tuple(f"{layer}:{expert}" for layer, expert in pairs)
    assert parse_experts((*patterns, *patterns), layers=range(3), experts=4) == sorted(pairs)


def test_stars_stand_for_all() -> None:
    assert parse_experts(("*:1",), range(2), 2) == [(0, 1), (1, 1)]
    assert parse_experts(("1:*",), range(2), 2) == [(1, 0), (1, 1)]
    assert parse_experts(("*:*", "0:0"), range(2), 2) == [(0, 0), (0, 1), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    "pattern", ["", ":", "*", "0", "0:", ":0", "2:0", "0:2", "-1:0", "0:1:1", "a:0", "²:0", "0 :1"]
)
def test_a_pattern_that_names_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(SetupError, match="LAYER:EXPERT"):
        parse_experts((pattern,), range(2), 2)


def test_layers_without_experts_are_left_out() -> None:
    assert parse_experts(("*:1",), [1, 3], 2) == [(1, 1), (3, 1)]
    with pytest.raises(SetupError, match="LAYER:EXPERT"):
        parse_experts(("2:1",), [1, 3], 2)
