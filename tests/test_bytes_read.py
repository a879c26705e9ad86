"""A service reads the bytes of its own parts and no others: counted by the operating system."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from expertmesh.checkpoint.manifest import FILE_NAME, Manifest, embedding_part, expert_part, gating_part
from expertmesh.checkpoint.split import split

FIXTURE = Path(__file__).parent / "fixtures" / "checkpoints" / "mixtral"
SLACK_BYTES = 16 * 2**10  # what counting itself reads
LOADING = """
import json, sys
from pathlib import Path

import torch

from expertmesh.checkpoint.load import StageLoader

folder = Path(sys.argv[1])


def read_bytes():
    return int(Path("/proc/self/io").read_text().split()[1])


StageLoader(folder, torch.device("cpu")).embedding()  # whatever the libraries read when they are first used
for calls in json.loads(sys.argv[2]):
    before = read_bytes()
    loader = StageLoader(folder, torch.device("cpu"))
    for method, arguments in calls:
        getattr(loader, method)(*arguments)
    print(read_bytes() - before)
"""
LAYERS = range(3)
SERVICES: dict[str, tuple[list[tuple[str, list[int]]], list[str]]] = {
    "an expert of every layer": (
        [("expert", [layer, 3]) for layer in LAYERS],
        [expert_part(layer, 3) for layer in LAYERS],
    ),
    "two single experts": ([("expert", [1, 0]), ("expert", [2, 7])], [expert_part(1, 0), expert_part(2, 7)]),
    "gating": ([("gating", [layer]) for layer in LAYERS], [gating_part(layer) for layer in LAYERS]),
    "embedding": ([("embedding", [])], [embedding_part()]),
}  # what each loads, and of which parts that is


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split") / "mixtral"
    split(FIXTURE, folder)
    return folder


@pytest.fixture(scope="module")
def bytes_read(model: Path) -> dict[str, int]:
    """By service; one process loads them all, each with a loader of its own."""
    every = json.dumps([calls for calls, _ in SERVICES.values()])
    command = [sys.executable, "-P", "-c", LOADING, str(model), every]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return dict(zip(SERVICES, map(int, done.stdout.split()), strict=True))


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_reads_its_own_parts_and_the_manifest(model: Path, bytes_read: dict[str, int], name: str) -> None:
    manifest = Manifest.read(model)
    _, parts = SERVICES[name]
    own = sum(manifest.parts[part].size_bytes for part in parts) + (model / FILE_NAME).stat().st_size
    everything = sum(part.size_bytes for part in manifest.parts.values())
    assert own <= bytes_read[name] <= own + SLACK_BYTES
    assert bytes_read[name] < everything / 2
