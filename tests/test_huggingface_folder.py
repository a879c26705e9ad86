"""Folders that are damaged, incomplete, hostile or odd: one clear line, and nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from expertmesh.checkpoint import tensor_file
from expertmesh.checkpoint.huggingface.source import TOKENIZER_FILES
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.checkpoint.split import split
from expertmesh.errors import BadCheckpoint
from tests import families, tiny

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
EXPERT = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
Edit = Callable[[dict[str, Tensor]], object]


def copied(tmp_path: Path, name: str, layout: str = "hub") -> Path:
    return tiny.copy_of(families.checkpoint(name, layout), tmp_path / "source")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return copied(tmp_path, "mixtral")


@pytest.fixture
def shards(source: Path) -> Path:
    """The same checkpoint in two files with an index."""
    tensors = safetensors.torch.load((source / WEIGHTS).read_bytes())
    (source / WEIGHTS).unlink()
    names = sorted(tensors)
    name2file = {name: SHARDS[names.index(name) % 2] for name in names}
    for shard in SHARDS:
        data = safetensors.torch.save({name: tensors[name] for name in names if name2file[name] == shard})
        (source / shard).write_bytes(data)
    (source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": name2file}))
    return source


def edit_tensors(path: Path, edit: Edit) -> None:
    tensors = safetensors.torch.load(path.read_bytes())
    edit(tensors)
    path.write_bytes(safetensors.torch.save(tensors))


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def set_file(folder: Path, name: str, file: Any) -> None:
    values = json.loads((folder / INDEX).read_text())
    values["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(values))


def with_header(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


def assert_refused(folder: Path, reason: str) -> None:
    before = sorted(path.name for path in folder.parent.iterdir())
    with pytest.raises(BadCheckpoint) as caught:
        split(folder, folder.parent / "target")
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in folder.parent.iterdir()) == before


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
FILES: list[tuple[Callable[[Path], object], str]] = [
    (lambda f: (f / "config.json").write_text("{"), "config.json is no JSON"),
    (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), "config.json is no JSON"),
    (lambda f: (f / "config.json").write_text("[1]"), "config.json holds no JSON object"),
    (lambda f: (f / "config.json").write_text("[" * 100_000), "config.json"),
    (lambda f: (f / "config.json").write_text('{"a": 1, "a": 1}'), "'a' occurs twice"),
    (lambda f: (f / "config.json").write_text(json.dumps({"a": "x" * 2**23})), "larger than"),
    (lambda f: (f / "config.json").unlink(), "it has no spec.json, nor is there a config.json"),
    (lambda f: (f / WEIGHTS).unlink(), f"neither {WEIGHTS} nor {INDEX}"),
    (lambda f: (f / WEIGHTS).rename(f / "pytorch_model.bin"), "pytorch_model.bin may be a pickle"),
    (lambda f: (f / WEIGHTS).write_bytes(pickle.dumps({"a": [1.0]})), "begins as a pickle does"),
    (lambda f: torch.save({"a": torch.ones(1)}, f / WEIGHTS), "begins as a pickle does"),
    (lambda f: (f / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\noid x\n"), "Git LFS pointer"),
    (lambda f: (f / WEIGHTS).write_bytes(b""), "it has 0 bytes"),
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]), "may be truncated"),
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:200]), "claims a header of"),
    (lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes() + b"\0"), "its header describes"),
    (lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 2**63) + b"{}"), "claims a header of 9223372036854775808"),
    (lambda f: (f / WEIGHTS).write_bytes(struct.pack("<Q", 3) + b"{}"), "claims a header of 3"),
    (lambda f: with_header(f / WEIGHTS, b"[]"), "its header is no JSON"),
    (lambda f: with_header(f / WEIGHTS, b'{"a"}'), "no JSON"),
    (lambda f: with_header(f / WEIGHTS, b'{"a":{},"a":{}}'), "'a' occurs twice"),
    (lambda f: with_header(f / WEIGHTS, b'{"a":' * 100_000), "no JSON"),
    (lambda f: with_header(f / WEIGHTS, json.dumps({"a": 1}).encode()), "entry of tensor 'a' is malformed"),
    (lambda f: with_header(f / WEIGHTS, json.dumps({"a": ENTRY}).encode()), "its header describes"),
    (lambda f: with_header(f / WEIGHTS, json.dumps({"a": ENTRY, "b": ENTRY}).encode(), bytes(8)), "overlaps"),
    (lambda f: with_header(f / WEIGHTS, json.dumps({"a": {**ENTRY, "shape": [3]}}).encode(), bytes(8)), "needs 12"),
    (lambda f: with_header(f / WEIGHTS, json.dumps({"a": {**ENTRY, "shape": [-2]}}).encode(), bytes(8)), "malformed"),
    (lambda f: with_header(f / WEIGHTS, json.dumps({"a": {**ENTRY, "shape": [1] * 99}}).encode()), "malformed"),
    (lambda f: with_header(f / WEIGHTS, json.dumps({"a": {**ENTRY, "shape": [2**40] * 4}}).encode()), "needs"),
    (lambda f: with_header(f / WEIGHTS, json.dumps({"a": {**ENTRY, "shape": [10**99]}}).encode()), "malformed"),
    (lambda f: with_header(f / WEIGHTS, json.dumps({"a": {**ENTRY, "dtype": "OBJECT"}}).encode()), "'OBJECT'"),
    (lambda f: with_header(f / WEIGHTS, json.dumps({"a": {**ENTRY, "dtype": ["F32"]}}).encode()), "malformed"),
    (lambda f: (f / "generation_config.json").write_text("no"), "generation_config.json is no JSON"),
    (lambda f: edit_json(f / "generation_config.json", eos_token_id=[2, families.VOCAB]), "beyond the vocabulary"),
    (lambda f: edit_json(f / "generation_config.json", eos_token_id="two"), "eos_token_id must be ids"),
    (lambda f: (f / "tokenizer.json").unlink(), "neither tokenizer.json nor tokenizer.model"),
    (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer"),
    (lambda f: edit_json(f / "config.json", vocab_size=families.VOCAB + 1), "model.embed_tokens.weight"),
    (lambda f: edit_json(f / "config.json", num_hidden_layers=3), "misses tensor 'model.layers.2."),
    (lambda f: edit_json(f / "config.json", num_hidden_layers=1), "config.json says 1 layers"),
    (lambda f: edit_json(f / "config.json", num_local_experts=3), "has shape [4, 32]"),
    (lambda f: edit_json(f / "config.json", hidden_size=2**31 - 1, head_dim=8), "needs [264, 2147483647]"),
    (lambda f: edit_json(f / "config.json", vocab_size=2**31 - 1), "model.embed_tokens.weight"),
]


@pytest.mark.parametrize("case", range(len(FILES)))
def test_a_damaged_file_is_refused(source: Path, case: int) -> None:
    hurt, reason = FILES[case]
    hurt(source)
    assert_refused(source, reason)


def test_a_header_that_is_too_large_is_not_read(source: Path) -> None:
    with (source / WEIGHTS).open("wb") as file:  # sparse: it takes no space
        file.write(struct.pack("<Q", tensor_file.MAX_HEADER_BYTES + 1))
        file.truncate(tensor_file.MAX_HEADER_BYTES + 100)
    assert_refused(source, "claims a header of 100000001")


def test_a_header_with_too_many_tensors_is_not_parsed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "MAX_TENSORS", 10)
    assert_refused(source, "more than 10 tensors")


def move(old: str, new: str) -> Edit:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


TENSORS: list[tuple[Edit, str]] = [
    (move(EXPERT, EXPERT.replace("w1", "w4")), f"misses tensor '{EXPERT}'"),
    (move(EXPERT, "../../x"), f"misses tensor '{EXPERT}'"),
    (lambda t: t.update({"../../x": torch.ones(1)}), "tensor '../../x' has no place in a mixtral"),
    (lambda t: t.update({EXPERT.replace("experts.1", "experts.4"): torch.ones(24, 32)}), "experts.4.w1"),
    (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}), "q_proj.bias' has no place"),
    (lambda t: t.update({"model.layers.0.mlp.experts.gate_up_proj": torch.ones(4, 48, 32)}), "misses tensor"),
    (lambda t: t.update({"model.layers.2.eh_proj.weight": torch.ones(2)}), "has no place"),
    (lambda t: t.pop("lm_head.weight"), "misses tensor 'lm_head.weight'"),
    (lambda t: t.pop("model.layers.1.block_sparse_moe.gate.weight"), "block_sparse_moe.gate.weight'"),
    (lambda t: t.pop("model.norm.weight"), "misses tensor 'model.norm.weight'"),
    (lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}), "has shape [32, 24], config.json needs [24, 32]"),
    (lambda t: t.update({EXPERT: t[EXPERT].flatten()}), "has shape [768]"),
    (lambda t: t.update({EXPERT: t[EXPERT].double()}), "dtype float64"),
    (lambda t: t.update({EXPERT: t[EXPERT].to(torch.int8)}), "dtype int8"),
    (lambda t: t.update({EXPERT: t[EXPERT].to(torch.float8_e4m3fn)}), "dtype float8_e4m3fn"),
    (lambda t: t[EXPERT].view(-1)[5].fill_(float("nan")), "'gate.weight' holds values that are not finite"),
    (lambda t: t["model.norm.weight"][-1].fill_(float("inf")), "'norm.weight' holds values that are not finite"),
    (lambda t: t.update({"lm_head.weight": torch.ones(families.VOCAB - 1, 32)}), "'lm_head.weight' has shape"),
]


@pytest.mark.parametrize("case", range(len(TENSORS)))
def test_a_surprising_tensor_is_refused(source: Path, case: int) -> None:
    edit, reason = TENSORS[case]
    edit_tensors(source / WEIGHTS, edit)
    assert_refused(source, reason)


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("model-00009-of-00002.safetensors", "which model.safetensors.index.json does not say"),
        ("../outside.safetensors", "no name of a file in this folder"),
        ("/etc/outside.safetensors", "no name of a file in this folder"),
        ("..", "no safetensors file"),
        ("pytorch_model.bin", "no safetensors file"),
        (7, "no safetensors file"),
        (SHARDS[1], "which model.safetensors.index.json does not say"),
    ],
)
def test_an_index_that_lies_is_refused(shards: Path, file: Any, reason: str) -> None:
    shutil.copy(shards / SHARDS[0], shards.parent / "outside.safetensors")
    name = next(name for name, shard in json.loads((shards / INDEX).read_text())["weight_map"].items() if "1" in shard)
    set_file(shards, name, file)
    assert_refused(shards, reason)


def test_an_index_that_promises_too_much_or_nothing_is_refused(shards: Path) -> None:
    set_file(shards, "model.layers.9.x", SHARDS[0])
    assert_refused(shards, "misses tensor 'model.layers.9.x'")
    for content in ("{}", '{"weight_map": {}}', '{"weight_map": [1]}'):
        (shards / INDEX).write_text(content)
        assert_refused(shards, "has no weight_map")


def test_a_missing_shard_is_refused(shards: Path) -> None:
    (shards / SHARDS[1]).unlink()
    assert_refused(shards, SHARDS[1])


def test_shards_give_the_same_model_as_one_file(shards: Path, tmp_path: Path) -> None:
    split(shards, tmp_path / "target")
    assert Manifest.read(tmp_path / "target").parts == Manifest.read(families.model("mixtral")).parts


@pytest.mark.parametrize("file", [WEIGHTS, "config.json", "tokenizer.json"])
def test_a_link_out_of_the_folder_is_refused(source: Path, tmp_path: Path, file: str) -> None:
    (source / file).rename(tmp_path / "elsewhere")
    (source / file).symlink_to(tmp_path / "elsewhere")
    assert_refused(source, "leads out of the folder")


def test_links_of_the_download_cache_are_followed(source: Path, tmp_path: Path) -> None:
    """`huggingface-cli download` gives a snapshot whose files are links to blobs beside it."""
    model = tmp_path / "models--a--b"
    snapshot, blobs = model / "snapshots" / "0123", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in source.iterdir():
        path.rename(blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"blob-{path.name}")
    split(snapshot, tmp_path / "target")
    assert Manifest.read(tmp_path / "target").parts == Manifest.read(families.model("mixtral")).parts


def test_what_is_no_regular_file_is_refused(source: Path) -> None:
    (source / WEIGHTS).unlink()
    os.mkfifo(source / WEIGHTS)
    assert_refused(source, "there is no file")


def test_stored_frequencies_and_prediction_layers_are_left_out(tmp_path: Path) -> None:
    source = copied(tmp_path, "deepseek_v3")
    layer = "model.layers.3."
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        f"{layer}eh_proj.weight": torch.ones(2),
        f"{layer}self_attn.o_proj.weight": torch.ones(2).to(torch.float8_e4m3fn),
    }
    edit_tensors(source / WEIGHTS, lambda tensors: tensors.update(more))
    split(source, tmp_path / "target")
    assert Manifest.read(tmp_path / "target").parts == Manifest.read(families.model("deepseek_v3")).parts
    edit_tensors(source / WEIGHTS, lambda tensors: tensors.pop(f"{layer}eh_proj.weight"))
    with pytest.raises(BadCheckpoint, match=r"model\.layers\.3\.self_attn.*config\.json says 3 layers"):
        split(source, tmp_path / "other")


def test_a_tied_head_may_be_stored_if_it_is_the_embedding(tmp_path: Path) -> None:
    source = copied(tmp_path, "granitemoe")
    edit_tensors(source / WEIGHTS, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    split(source, tmp_path / "target")
    assert Manifest.read(tmp_path / "target").parts == Manifest.read(families.model("granitemoe")).parts
    edit_tensors(source / WEIGHTS, lambda t: t["lm_head.weight"][3, 3].add_(1))
    with pytest.raises(BadCheckpoint, match="ties lm_head"):
        split(source, tmp_path / "other")


@pytest.mark.parametrize("name", ["gate_up_proj_scales", "down_proj_scales"])
@pytest.mark.parametrize("scale", [255, 254])
def test_quantised_weights_that_overflow_are_refused(tmp_path: Path, name: str, scale: int) -> None:
    source = copied(tmp_path, families.QUANTISED)
    edit_tensors(source / WEIGHTS, lambda t: t[f"model.layers.1.mlp.experts.{name}"].fill_(scale))
    assert_refused(source, "not finite")


@pytest.mark.parametrize("suffix", ["_blocks", "_scales"])
def test_quantised_weights_of_another_shape_or_dtype_are_refused(tmp_path: Path, suffix: str) -> None:
    source = copied(tmp_path, families.QUANTISED)
    name = f"model.layers.1.mlp.experts.down_proj{suffix}"
    edit_tensors(source / WEIGHTS, lambda t: t.update({name: t[name].to(torch.int8)}))
    assert_refused(source, "has dtype torch.int8, not torch.uint8")
    edit_tensors(source / WEIGHTS, lambda t: t.update({name: t[name].to(torch.uint8)[:, :-1].contiguous()}))
    assert_refused(source, "has shape")


def test_a_tokenizer_with_more_ids_than_the_embedding_is_refused(source: Path) -> None:
    values = json.loads((source / "tokenizer.json").read_text())
    values["model"]["vocab"] |= {f"word{number}": 259 + number for number in range(10)}
    (source / "tokenizer.json").write_text(json.dumps(values))
    assert_refused(source, f"the tokenizer has 269 ids, the embedding only {families.VOCAB} rows")


def test_tokenizer_files_are_copied_byte_for_byte(source: Path, tmp_path: Path) -> None:
    given = {
        "special_tokens_map.json": b'{"eos_token":  "</s>"}',
        "chat_template.jinja": "{{ messages }} …\r\n".encode(),
        "tokenizer_config.json": (source / "tokenizer_config.json").read_bytes() + b"\n\n",
        "tokenizer.json": (source / "tokenizer.json").read_bytes(),
    }
    for name, data in given.items():
        (source / name).write_bytes(data)
    (source / "README.md").write_text("not a tokenizer file")
    manifest = split(source, tmp_path / "target")
    assert {path.name: path.read_bytes() for path in (tmp_path / "target" / "tokenizer").iterdir()} == given
    assert manifest.tokenizer_parts() == [f"tokenizer/{name}" for name in sorted(given)]
    assert given.keys() <= set(TOKENIZER_FILES)


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [(None, 2, (2,)), (5, 2, (5,)), ([7, 5, 7], 2, (7, 5)), ([], 2, ()), (None, [3, 4], (3, 4)), (None, None, ())],
)
def test_end_ids_are_those_of_generation_else_of_the_model(
    source: Path, tmp_path: Path, generation: Any, config: Any, ends: tuple[int, ...]
) -> None:
    edit_json(source / "config.json", eos_token_id=config)
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    assert split(source, tmp_path / "target").spec.head.end_ids == ends


def test_half_precision_stays_half_on_disk(source: Path, tmp_path: Path) -> None:
    edit_tensors(source / WEIGHTS, lambda tensors: tensors.update({k: v.bfloat16() for k, v in tensors.items()}))
    for dtype in ("float32", "bfloat16"):
        manifest = split(source, tmp_path / dtype, dtype=dtype)
        assert manifest.spec.dtype == dtype
        for part in tmp_path.glob(f"{dtype}/**/*.safetensors"):
            assert {value.dtype for value in safetensors.torch.load(part.read_bytes()).values()} == {torch.bfloat16}
    with pytest.raises(BadCheckpoint, match="dtype"):
        split(source, tmp_path / "other", dtype="float16")


def test_the_command_says_what_it_wrote_and_errors_in_one_line(source: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "expertmesh.cli.main", "split", str(source), str(tmp_path / "out")]
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)

    done = run("--name", "mine", "--dtype", "bfloat16", "--context", "50")
    assert done.returncode == 0, done.stderr
    manifest = Manifest.read(tmp_path / "out")
    assert (manifest.name, manifest.spec.dtype, manifest.spec.context) == ("mine", "bfloat16", 50)
    assert f"model digest {manifest.digest[:16]}" in done.stdout
    assert "mine: mixtral, 2 layers, 2 with 4 experts of which 2 are used, context 50, bfloat16" in done.stdout
    done = run("--context", "97")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        f"error: {source}/config.json: a context of 97 was asked for; the model has at most 96"
    ]
