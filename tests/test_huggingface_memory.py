"""Splitting holds a piece of one tensor in memory, whatever the size of the checkpoint."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from expertmesh.checkpoint.manifest import Manifest
from tests import families

MIB = 2**20
LARGE = "EXPERTMESH_TEST_LARGE"  # set to run the test that writes 4 GB
CHILD = """
import sys
from pathlib import Path
from expertmesh.cli import split as _
from expertmesh.checkpoint.split import split

def peak_kib():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

before = peak_kib()
split(Path(sys.argv[1]), Path(sys.argv[2]))
print(before * 1024, peak_kib() * 1024)
"""


def write_checkpoint(folder: Path, expert_width: int, layout: str) -> int:
    """A mixtral with random weights, written in pieces; gives its size in bytes."""
    width, experts, layers = 512, 8, 2
    config = {
        "model_type": "mixtral",
        "vocab_size": families.VOCAB,
        "hidden_size": width,
        "intermediate_size": expert_width,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "num_local_experts": experts,
        "max_position_embeddings": 64,
    }
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (families.VOCAB, width),
        "lm_head.weight": (families.VOCAB, width),
        "model.norm.weight": (width,),
    }
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes |= {f"{prefix}self_attn.{name}_proj.weight": (width, width) for name in "qkvo"}
        shapes |= {f"{prefix}{name}_layernorm.weight": (width,) for name in ("input", "post_attention")}
        if layout == "fused":
            shapes[f"{prefix}mlp.gate.weight"] = (experts, width)
            shapes[f"{prefix}mlp.experts.gate_up_proj"] = (experts, 2 * expert_width, width)
            shapes[f"{prefix}mlp.experts.down_proj"] = (experts, width, expert_width)
            continue
        shapes[f"{prefix}block_sparse_moe.gate.weight"] = (experts, width)
        for expert in range(experts):
            names = {"w1": (expert_width, width), "w2": (width, expert_width), "w3": (expert_width, width)}
            shapes |= {f"{prefix}block_sparse_moe.experts.{expert}.{name}.weight": s for name, s in names.items()}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    families.write_tokenizer(folder)
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}
    plain = json.dumps(header).encode()
    noise = np.random.default_rng(0).standard_normal(MIB, np.float32).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(plain)) + plain)
        for begin in range(0, end, len(noise)):
            file.write(noise[: min(len(noise), end - begin)])
    return end


def peaks(source: Path, target: Path) -> tuple[int, int]:
    """Most memory resident in a process before and after it split, in bytes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CHILD, str(source), str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    before, after = map(int, done.stdout.split())
    return before, after


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks are read from /proc")


@needs_proc
@pytest.mark.parametrize("layout", families.LAYOUTS)
def test_splitting_200_megabytes_takes_little_memory(tmp_path: Path, layout: str) -> None:
    size = write_checkpoint(tmp_path / "source", 2048, layout)
    assert size > 200e6
    before, after = peaks(tmp_path / "source", tmp_path / "target")
    assert after - before < 80 * MIB
    assert sum(part.size_bytes for part in Manifest.read(tmp_path / "target").parts.values()) > size


@needs_proc
def test_splitting_a_split_takes_little_memory(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "source", 2048, "hub")
    peaks(tmp_path / "source", tmp_path / "target")
    before, after = peaks(tmp_path / "target", tmp_path / "again")
    assert after - before < 80 * MIB


@needs_proc
@pytest.mark.skipif(LARGE not in os.environ, reason=f"{LARGE} is not set")
@pytest.mark.parametrize("layout", families.LAYOUTS)
def test_splitting_2_gigabytes_peaks_below_1(tmp_path: Path, layout: str) -> None:
    size = write_checkpoint(tmp_path / "source", 20_480, layout)
    assert size > 2e9
    before, after = peaks(tmp_path / "source", tmp_path / "target")
    print(f"{layout}: {size / 1e9:.2f} GB, peak {before / 1e6:.0f} MB before, {after / 1e6:.0f} MB after")
    assert after < 1e9
