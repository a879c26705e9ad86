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

folder, calls = Path(sys.argv[1]), json.loads(sys.argv[2])


def read_bytes():
    return int(Path("/proc/self/io").read_text().split()[1])


StageLoader(folder, torch.device("cpu")).embedding()  # whatever the libraries read when they are first used
before = read_bytes()
loader = StageLoader(folder, torch.device("cpu"))
for method, arguments in calls:
    getattr(loader, method)(*arguments)
print(read_bytes() - before)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split") / "mixtral"
    split(FIXTURE, folder)
    return folder


def bytes_read(model: Path, calls: list[tuple[str, list[int]]]) -> int:
    command = [sys.executable, "-P", "-c", LOADING, str(model), json.dumps(calls)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return int(done.stdout)


@pytest.mark.parametrize(
    ("calls", "parts"),
    [
        ([("expert", [layer, 3]) for layer in range(3)], [expert_part(layer, 3) for layer in range(3)]),
        ([("expert", [1, 0]), ("expert", [2, 7])], [expert_part(1, 0), expert_part(2, 7)]),
        ([("gating", [layer]) for layer in range(3)], [gating_part(layer) for layer in range(3)]),
        ([("embedding", [])], [embedding_part()]),
    ],
    ids=["an expert of every layer", "two single experts", "gating", "embedding"],
)
def test_a_service_reads_its_own_parts_and_the_manifest(
    model: Path, calls: list[tuple[str, list[int]]], parts: list[str]
) -> None:
    manifest = Manifest.read(model)
    own = sum(manifest.parts[part].size_bytes for part in parts) + (model / FILE_NAME).stat().st_size
    everything = sum(part.size_bytes for part in manifest.parts.values())
    read = bytes_read(model, calls)
    assert own <= read <= own + SLACK_BYTES
    assert read < everything / 2
