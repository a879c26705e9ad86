from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from expertmesh.checkpoint.load import StageLoader
from expertmesh.checkpoint.manifest import FILE_NAME, Manifest, expert_part, model_parts
from expertmesh.checkpoint.parts import write_part
from expertmesh.checkpoint.shapes import PartShapes
from expertmesh.checkpoint.split import SPEC_FILE, WEIGHTS_FILE, split
from expertmesh.checkpoint.tensor_file import read_header
from expertmesh.checkpoint.tokenizer import load_tokenizer
from expertmesh.errors import BadCheckpoint, SetupError
from expertmesh.model.spec import AttentionSpec, EmbeddingSpec, ExpertSpec, HeadSpec, ModelSpec, RouterSpec
from tests import families, tiny

CPU = torch.device("cpu")
PART = expert_part(0, 1)
Edit = Callable[[dict[str, Tensor]], object]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.copy_of(tiny.checkpoint(), tmp_path / "source")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.copy_of(tiny.model(), tmp_path / "model")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def change_weights(path: Path, edit: Edit) -> None:
    tensors = safetensors.torch.load(path.read_bytes())
    edit(tensors)
    path.write_bytes(safetensors.torch.save(tensors))


def replace_part(folder: Path, name: str, data: bytes) -> None:
    """Swaps a part's file and says so in the manifest, as somebody does who can write both."""
    (folder / f"{name}.safetensors").write_bytes(data)
    values = json.loads((folder / FILE_NAME).read_bytes())
    values["parts"][name] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (folder / FILE_NAME).write_text(json.dumps(values))


def change_part(folder: Path, name: str, edit: Edit) -> None:
    tensors = safetensors.torch.load((folder / f"{name}.safetensors").read_bytes())
    edit(tensors)
    replace_part(folder, name, safetensors.torch.save(tensors))


def load_expert(folder: Path) -> torch.nn.Module:
    return StageLoader(folder, CPU).expert(0, 1)


def test_splitting_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    split(tiny.checkpoint(), tmp_path / "one")
    split(tiny.checkpoint(), tmp_path / "another name")
    assert contents(tmp_path / "one") == contents(tmp_path / "another name")


def test_a_split_of_a_split_is_the_same(tmp_path: Path) -> None:
    split(tiny.model(), tmp_path / "again")
    assert contents(tmp_path / "again") == contents(tiny.model())


def test_a_model_can_be_split_onto_itself(folder: Path) -> None:
    before = contents(folder)
    split(folder, folder)
    assert contents(folder) == before


def test_parts_hold_every_tensor_of_the_checkpoint_once(tmp_path: Path) -> None:
    whole = safetensors.torch.load_file(tiny.checkpoint() / WEIGHTS_FILE)
    given: dict[str, Tensor] = {}
    for name in model_parts(tiny.full_model().spec):
        prefix = name.replace("layer-0", "").replace("expert-0", "").replace("/", ".")
        for tensor, value in safetensors.torch.load_file(tiny.model() / f"{name}.safetensors").items():
            given[f"{prefix}.{tensor}"] = value
    assert given.keys() == whole.keys()
    assert all(torch.equal(given[name], whole[name]) for name in whole)


def test_the_loaded_model_computes_what_the_checkpoint_does() -> None:
    tensors = safetensors.torch.load_file(tiny.checkpoint() / WEIGHTS_FILE)
    loaded = tiny.full_model().state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_half_precision_is_stored_as_it_is_and_computed_in_fp32(source: Path, tmp_path: Path) -> None:
    change_weights(source / WEIGHTS_FILE, lambda tensors: tensors.update({k: v.half() for k, v in tensors.items()}))
    split(source, tmp_path / "model")
    stored = safetensors.torch.load_file(tmp_path / "model" / f"{PART}.safetensors")
    assert {value.dtype for value in stored.values()} == {torch.float16}
    assert {value.dtype for value in load_expert(tmp_path / "model").state_dict().values()} == {torch.float32}


def test_parts_are_what_safetensors_would_write(tmp_path: Path) -> None:
    tensors = {
        "b.weight": torch.arange(6.0).view(2, 3),
        "a": torch.ones(5, dtype=torch.bfloat16),
        "c": torch.ones(3, dtype=torch.float16),
        "a.bias": torch.zeros(1),
        "empty": torch.zeros(0, 4),
    }
    (tmp_path / "given").write_bytes(safetensors.torch.save(tensors))
    part = write_part(tmp_path, "experts/layer-00/expert-00", read_header(tmp_path / "given"))
    written = (tmp_path / part.file).read_bytes()
    assert written == (tmp_path / "given").read_bytes()
    assert (part.size_bytes, part.digest) == (len(written), hashlib.sha256(written).digest())


def test_sizes_whose_product_cannot_be_counted_are_refused() -> None:
    attention = AttentionSpec(heads=2**30, kind="grouped", kv_heads=1, head_width=2**30)
    head = HeadSpec(kind="language")
    spec = ModelSpec(2**30, 1, 8, EmbeddingSpec(vocab=9), attention, RouterSpec(), ExpertSpec(width=8), head)
    with pytest.raises(BadCheckpoint, match="too large"):
        PartShapes(spec).of("gating/layer-00")


def test_a_smaller_context_can_be_had_of_models_without_learned_positions(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match="a context of 8"):
        split(source, tmp_path / "target", context=8)
    again = split(families.model("mixtral"), tmp_path / "target", context=8, dtype="bfloat16")
    assert (again.spec.context, again.spec.dtype) == (8, "bfloat16")
    assert again.parts == Manifest.read(families.model("mixtral")).parts
    with pytest.raises(BadCheckpoint, match="a context of 97"):
        split(families.model("mixtral"), tmp_path / "other", context=97)


def test_a_target_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot be written"):
        split(tiny.checkpoint(), tmp_path / "file" / "model")


def test_progress_is_told_for_every_part(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    split(tiny.checkpoint(), tmp_path / "model", progress=lambda *step: seen.append(step))
    parts = list(model_parts(tiny.full_model().spec))
    assert seen == [(part, done, len(parts)) for done, part in enumerate(parts, start=1)]


def test_the_name_is_the_sources_unless_one_is_given(tmp_path: Path) -> None:
    assert split(tiny.checkpoint(), tmp_path / "a").name == tiny.NAME
    assert split(tmp_path / "a", tmp_path / "b").name == tiny.NAME
    assert split(tmp_path / "a", tmp_path / "c", name="other").name == "other"


def test_an_earlier_split_is_replaced_and_its_card_kept(folder: Path) -> None:
    (folder / "README.md").write_text("card")
    (folder / "experts" / "layer-00" / "expert-09.safetensors").write_bytes(b"stale")
    split(tiny.checkpoint(), folder)
    after = contents(folder)
    assert after.pop("README.md") == b"card"
    assert after == contents(tiny.model())


def test_an_empty_target_is_filled(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    split(tiny.checkpoint(), tmp_path / "model")
    assert contents(tmp_path / "model") == contents(tiny.model())


def test_a_foreign_target_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BadCheckpoint, match="not empty and holds no split model"):
        split(tiny.checkpoint(), tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


def test_a_target_that_is_a_file_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file")
    with pytest.raises(BadCheckpoint, match="model"):
        split(tiny.checkpoint(), tmp_path / "model")
    assert (tmp_path / "model").read_text() == "a file"


def rename(old: str, new: str) -> Edit:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def damage(source: Path) -> list[tuple[Callable[[], object], str]]:
    """Ways to break a checkpoint, and what the error must name."""
    weights = source / WEIGHTS_FILE
    return [
        (lambda: weights.unlink(), WEIGHTS_FILE),
        (lambda: (source / SPEC_FILE).unlink(), SPEC_FILE),
        (lambda: (source / SPEC_FILE).write_bytes(b"\xff{"), SPEC_FILE),
        (lambda: (source / SPEC_FILE).write_text("[1]"), "spec"),
        (lambda: (source / SPEC_FILE).write_text("[" * 100_000), "spec"),
        (lambda: (source / SPEC_FILE).write_text("{}"), "spec"),
        (lambda: weights.write_bytes(weights.read_bytes()[:-4]), WEIGHTS_FILE),
        (lambda: weights.write_bytes(weights.read_bytes() + b"\0"), WEIGHTS_FILE),
        (lambda: weights.write_bytes(b""), WEIGHTS_FILE),
        (lambda: weights.write_bytes(pickle.dumps({"embedding.token.weight": [1.0]})), WEIGHTS_FILE),
        (lambda: torch.save({"embedding.token.weight": torch.ones(2)}, weights), WEIGHTS_FILE),
        (lambda: weights.write_bytes(struct.pack("<Q", 2**63) + b"{}"), WEIGHTS_FILE),
        (lambda: change_weights(weights, rename("classifier.out.weight", "decoder.weight")), "'decoder.weight'"),
        (lambda: change_weights(weights, rename("classifier.out.weight", "../../x")), "'../../x'"),
        (
            lambda: change_weights(weights, lambda all_: [all_.pop(key) for key in list(all_) if "gating.1" in key]),
            "gating/layer-01",
        ),
        (
            lambda: change_weights(weights, rename("experts.0.1.up.weight", "experts.0.7.up.weight")),
            "experts/layer-00/expert-07",
        ),
        (lambda: change_weights(weights, lambda all_: all_.update({"embedding.x": torch.ones(1).long()})), "int64"),
    ]


CASES = range(len(damage(Path())))


@pytest.mark.parametrize("case", CASES)
def test_a_failing_split_leaves_nothing_behind(source: Path, tmp_path: Path, case: int) -> None:
    hurt, reason = damage(source)[case]
    hurt()
    with pytest.raises(BadCheckpoint) as caught:
        split(source, tmp_path / "target")
    assert reason in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_a_failing_split_leaves_the_old_one(source: Path, folder: Path) -> None:
    before = contents(folder)
    change_weights(source / WEIGHTS_FILE, lambda all_: [all_.pop(key) for key in list(all_) if "gating.1" in key])
    with pytest.raises(BadCheckpoint):
        split(source, folder)
    assert contents(folder) == before
    assert sorted(path.name for path in folder.parent.iterdir()) == ["model", "source"]


def test_a_split_that_is_interrupted_leaves_the_old_one(folder: Path) -> None:
    before = contents(folder)

    def interrupt(part: str, done: int, of: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        split(tiny.checkpoint(), folder, progress=interrupt)
    assert contents(folder) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_a_damaged_split_is_not_split_again(folder: Path, tmp_path: Path) -> None:
    path = folder / f"{PART}.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BadCheckpoint, match=f"part {PART}"):
        split(folder, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_what_split_writes_can_be_read(source: Path, tmp_path: Path) -> None:
    """A stray file beside the vocabulary must not give a model that no service accepts."""
    (source / "tokenizer" / "NOTES.md").write_text("stray")
    (source / "tokenizer" / ".cache").mkdir()
    split(source, tmp_path / "target")
    assert contents(tmp_path / "target").keys() == contents(tiny.model()).keys()
    assert Manifest.read(tmp_path / "target").parts == Manifest.read(tiny.model()).parts


def test_a_part_with_one_changed_byte_is_refused(folder: Path) -> None:
    path = folder / f"{PART}.safetensors"
    content = bytearray(path.read_bytes())
    for place in (0, 9, len(content) // 2, len(content) - 1):
        content[place] ^= 1
        path.write_bytes(content)
        with pytest.raises(BadCheckpoint, match=f"part {PART}: the SHA-256"):
            load_expert(folder)
        content[place] ^= 1
    path.write_bytes(content)
    load_expert(folder)


def test_a_part_that_is_truncated_missing_or_swapped_is_refused(folder: Path) -> None:
    one, other = folder / f"{PART}.safetensors", folder / f"{expert_part(1, 1)}.safetensors"
    mine, theirs = one.read_bytes(), other.read_bytes()
    one.write_bytes(theirs)
    other.write_bytes(mine)
    for loader, name in ((load_expert, PART), (lambda at: StageLoader(at, CPU).expert(1, 1), expert_part(1, 1))):
        with pytest.raises(BadCheckpoint, match=f"part {name}: the SHA-256"):
            loader(folder)
    one.write_bytes(mine[:100])
    with pytest.raises(BadCheckpoint, match=f"part {PART}: .*100 bytes"):
        load_expert(folder)
    one.unlink()
    with pytest.raises(BadCheckpoint, match=f"part {PART}: .*cannot be read"):
        load_expert(folder)


class Evil:
    """Unpickled, it would leave a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.mark,))


def test_a_pickle_is_refused_by_its_content_and_never_run(folder: Path, tmp_path: Path) -> None:
    replace_part(folder, PART, pickle.dumps(Evil(tmp_path / "mark")))
    with pytest.raises(BadCheckpoint, match=f"part {PART} is no safetensors file"):
        load_expert(folder)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (rename("up.weight", "side.weight"), "'side.weight'"),
        (rename("up.weight", "../../up.weight"), "'../../up.weight'"),
        (lambda tensors: tensors.pop("gate.weight"), "'gate.weight' is absent"),
        (lambda tensors: tensors.update({"extra": torch.ones(1)}), "'extra'"),
        (lambda tensors: tensors.update({"up.weight": tensors["up.weight"].T.contiguous()}), "'up.weight'"),
        (lambda tensors: tensors.update({"up.weight": torch.ones(24, 33)}), "'up.weight'"),
        (lambda tensors: tensors.update({"up.weight": torch.ones(0)}), "'up.weight'"),
        (lambda tensors: tensors.update({"up.weight": tensors["up.weight"].double()}), "float64"),
        (lambda tensors: tensors.update({"up.weight": tensors["up.weight"].to(torch.int32)}), "int32"),
        (lambda tensors: tensors["down.weight"].view(-1)[7].fill_(float("nan")), "'down.weight' holds values"),
        (lambda tensors: tensors["down.weight"].view(-1)[0].fill_(float("-inf")), "'down.weight' holds values"),
    ],
)
def test_a_part_with_a_surprising_tensor_is_refused(folder: Path, edit: Edit, reason: str) -> None:
    change_part(folder, PART, edit)
    with pytest.raises(BadCheckpoint) as caught:
        load_expert(folder)
    assert f"part {PART}" in str(caught.value)
    assert reason in str(caught.value)


def test_a_part_with_a_header_that_lies_is_refused(folder: Path) -> None:
    def header(**tensors: object) -> bytes:
        plain = json.dumps(tensors).encode()
        return struct.pack("<Q", len(plain)) + plain

    entry = {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 4]}
    lies = [
        header(up=entry) + bytes(4),
        header(up={**entry, "shape": [1], "data_offsets": [4, 0]}) + bytes(4),
        header(up={**entry, "shape": [1], "dtype": "OBJECT"}) + bytes(4),
        header(up={**entry, "shape": [-1]}) + bytes(4),
        header(up={**entry, "shape": [1], "data_offsets": [0, 400]}) + bytes(4),
    ]
    for data in lies:
        replace_part(folder, PART, data)
        with pytest.raises(BadCheckpoint, match=f"part {PART}"):
            load_expert(folder)


@pytest.mark.parametrize(
    ("load", "own"),
    [
        (lambda loader: loader.embedding(), ["embedding"]),
        (lambda loader: loader.gating(1), ["gating/layer-01"]),
        (lambda loader: loader.expert(0, 1), [PART]),
        (lambda loader: loader.classifier(), ["classifier"]),
    ],
)
def test_a_stage_opens_its_own_part_and_no_other(
    folder: Path, load: Callable[[StageLoader], object], own: list[str]
) -> None:
    for path in folder.rglob("*.safetensors"):
        if str(path.relative_to(folder)).removesuffix(".safetensors") not in own:
            path.unlink()
    for path in (folder / "tokenizer").iterdir():
        path.unlink()
    loader = StageLoader(folder, CPU)
    load(loader)
    assert loader.loaded == own
    for name in own:
        (folder / f"{name}.safetensors").unlink()
    with pytest.raises(BadCheckpoint, match="cannot be read"):
        load(StageLoader(folder, CPU))


def test_the_full_model_loads_every_part_once() -> None:
    loader = StageLoader(tiny.model(), CPU)
    model = loader.full_model()
    assert sorted(loader.loaded) == sorted(model_parts(loader.spec))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_tokenizer_reads_its_own_files_and_checks_them(folder: Path) -> None:
    for path in folder.rglob("*.safetensors"):
        path.unlink()
    manifest = Manifest.read(folder)
    assert load_tokenizer(folder, manifest).vocab == manifest.spec.embedding.vocab
    path = folder / "tokenizer" / "normalizer.json"
    path.write_bytes(path.read_bytes().replace(b"1", b"2", 1))
    with pytest.raises(BadCheckpoint, match=r"part tokenizer/normalizer\.json"):
        load_tokenizer(folder, manifest)


def test_a_tokenizer_with_more_ids_than_rows_is_refused(folder: Path) -> None:
    values = json.loads((folder / FILE_NAME).read_bytes())
    values["spec"]["embedding"]["vocab"] -= 1
    (folder / FILE_NAME).write_text(json.dumps(values))
    with pytest.raises(BadCheckpoint, match="ids, the embedding only"):
        load_tokenizer(folder, Manifest.read(folder))
