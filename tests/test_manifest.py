from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from expertmesh.checkpoint.manifest import (
    FILE_NAME,
    MAX_MANIFEST_BYTES,
    Manifest,
    expert_part,
    gating_part,
    model_parts,
    read_checked,
)
from expertmesh.errors import BadCheckpoint
from tests import tiny

EXPERT = expert_part(1, 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.copy_of(tiny.model(), tmp_path / "model")


def change(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / FILE_NAME
    values = json.loads(path.read_bytes())
    edit(values)
    path.write_text(json.dumps(values))


def test_what_is_written_is_read(tmp_path: Path) -> None:
    manifest = replace(Manifest.read(tiny.model()), verified_on="cpu-fp32")
    manifest.write(tmp_path)
    assert Manifest.read(tmp_path) == manifest
    assert [path.name for path in tmp_path.iterdir()] == [FILE_NAME]


def test_parts_are_every_stage_in_the_order_of_a_request() -> None:
    parts = list(model_parts(tiny.full_model().spec))
    assert parts[0] == "embedding"
    assert parts[1:3] == ["gating/layer-00", "experts/layer-00/expert-00"]
    assert parts[-2:] == ["experts/layer-01/expert-03", "classifier"]
    assert len(set(parts)) == len(parts) == 2 + tiny.LAYERS * (1 + tiny.EXPERTS)


def test_the_digest_is_of_what_decides_an_answer() -> None:
    manifest = Manifest.read(tiny.model())
    assert replace(manifest, name="other", verified_on="other").digest == manifest.digest
    assert replace(manifest, spec=replace(manifest.spec, context=47)).digest != manifest.digest
    part = manifest.parts[EXPERT]
    changed = {**manifest.parts, EXPERT: replace(part, digest=bytes(32))}
    assert replace(manifest, parts=changed).digest != manifest.digest


def test_a_folder_without_manifest_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="there is no model folder"):
        Manifest.read(tmp_path / "nowhere")
    with pytest.raises(BadCheckpoint, match="expertmesh split CHECKPOINT"):
        Manifest.read(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00garbage",
        b"{",
        b"[]",
        b"null",
        b"7",
        b'"text"',
        b"{}",
        b'{"format": 1}',
        b"[" * 100_000,
        b'{"format": 1, "spec": ' + b'{"a":' * 100_000,
        b'{"format": 1, "name": "x", "parts": {}, "spec": []}',
        b'{"format": 1, "name": "x", "parts": [], "spec": {}}',
    ],
)
def test_a_manifest_that_is_garbage_is_damaged(folder: Path, content: bytes) -> None:
    (folder / FILE_NAME).write_bytes(content)
    with pytest.raises(BadCheckpoint) as caught:
        Manifest.read(folder)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda values: values.update(format=2), "format 2; this version reads format 1"),
        (lambda values: values.update(format="1"), "format '1'"),
        (lambda values: values.pop("spec"), "spec"),
        (lambda values: values["spec"].update(colour="red"), "colour"),
        (lambda values: values["spec"].update(width="wide"), "model spec: model"),
        (lambda values: values["spec"].update(layers=2.5), "."),
        (lambda values: values["spec"].update(layers=10**9), "misses parts"),
        (lambda values: values["spec"]["router"].update(experts=5), "experts/layer-00/expert-04"),
        (lambda values: values["parts"].pop(EXPERT), f"the first is {EXPERT}"),
        (lambda values: values["parts"][EXPERT].pop("sha256"), "sha256"),
        (lambda values: values["parts"][EXPERT].update(sha256="zz"), "damaged"),
        (lambda values: values["parts"][EXPERT].update(sha256="00" * 31), EXPERT),
        (lambda values: values["parts"][EXPERT].update(bytes="many"), "damaged"),
        (lambda values: values["parts"][EXPERT].update(bytes=float("inf")), "damaged"),
        (lambda values: values["parts"].update({EXPERT: 3}), "damaged"),
    ],
)
def test_a_manifest_that_is_not_understood_is_refused(
    folder: Path, edit: Callable[[dict[str, Any]], Any], reason: str
) -> None:
    change(folder, edit)
    with pytest.raises(BadCheckpoint, match=reason):
        Manifest.read(folder)


@pytest.mark.parametrize(
    "file",
    [
        "../../etc/passwd",
        "/etc/passwd",
        "experts/layer-01/expert-02.safetensors/../../../../etc/passwd",
        "experts/layer-01/expert-02.bin",
        "experts/layer-01/expert-02.safetensors\n",
        "experts/layer-01/../layer-01/expert-02.safetensors",
        "experts/layer-01/expert-03.safetensors",
        "gating/layer-01.safetensors",
        "experts\\layer-01\\expert-02.safetensors",
        "",
    ],
)
def test_a_part_has_the_file_of_its_name_and_no_other(folder: Path, file: str) -> None:
    change(folder, lambda values: values["parts"][EXPERT].update(file=file))
    with pytest.raises(BadCheckpoint, match=EXPERT):
        Manifest.read(folder)


@pytest.mark.parametrize("name", ["tokenizer/../../x", "tokenizer/a.py", "tokenizer/", "../x", "extra", ""])
def test_a_part_has_a_name_from_the_list(folder: Path, name: str) -> None:
    part = {"file": name, "bytes": 1, "sha256": "00" * 32}
    change(folder, lambda values: values["parts"].update({name: part}))
    with pytest.raises(BadCheckpoint, match="cannot be right"):
        Manifest.read(folder)


def test_a_manifest_that_is_too_large_is_not_read(folder: Path) -> None:
    with (folder / FILE_NAME).open("r+b") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)
    with pytest.raises(BadCheckpoint, match="larger than"):
        Manifest.read(folder)


def test_a_part_is_read_if_it_is_the_one_in_the_manifest(folder: Path) -> None:
    part = Manifest.read(folder).parts[EXPERT]
    path = folder / part.file
    content = path.read_bytes()
    assert read_checked(folder, EXPERT, part) == content

    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BadCheckpoint, match=f"part {EXPERT}: the SHA-256"):
        read_checked(folder, EXPERT, part)
    path.write_bytes(content[:-1])
    with pytest.raises(BadCheckpoint, match=f"part {EXPERT}: .* has {len(content) - 1} bytes"):
        read_checked(folder, EXPERT, part)
    path.unlink()
    with pytest.raises(BadCheckpoint, match=f"part {EXPERT}: .* cannot be read"):
        read_checked(folder, EXPERT, part)
    path.mkdir()
    with pytest.raises(BadCheckpoint, match=f"part {EXPERT}: .* cannot be read"):
        read_checked(folder, EXPERT, part)


def test_names_have_the_layer_and_the_expert() -> None:
    assert gating_part(3) == "gating/layer-03"
    assert expert_part(11, 107) == "experts/layer-11/expert-107"
