from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import expertmesh
from expertmesh.errors import BadCheckpoint
from expertmesh.model.spec import (
    AttentionSpec,
    EmbeddingSpec,
    ExpertSpec,
    HeadSpec,
    ModelSpec,
    NormSpec,
    RouterSpec,
)
from tests.decoders import SPECS

STAGES = ("embedding", "attention", "router", "expert", "head", "norm", "rotary", "dense")

sizes = st.integers(1, 10_000)


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    heads, experts = draw(st.integers(1, 64)), draw(st.integers(1, 256))
    bigrams = draw(st.booleans())
    return ModelSpec(
        width=heads * draw(st.integers(2, 256)),
        layers=draw(sizes),
        context=draw(sizes),
        embedding=EmbeddingSpec(draw(sizes), draw(sizes) if bigrams else 0, draw(sizes) if bigrams else 0),
        attention=AttentionSpec(heads),
        router=RouterSpec(experts, draw(st.integers(1, experts)), renormalise=draw(st.booleans())),
        expert=ExpertSpec(draw(sizes)),
        head=HeadSpec(
            tuple(draw(st.lists(st.text(), min_size=2, max_size=9, unique=True))),
            draw(st.sampled_from(["mean", "max", "mean_max"])),
        ),
        norm=NormSpec(draw(st.floats(1e-12, 1))),
    )


def plain() -> dict[str, Any]:
    return {
        "width": 48,
        "layers": 2,
        "context": 128,
        "embedding": {
            "vocab": 100, "bigram_buckets": 64, "bigram_width": 8, "learned_positions": True, "multiplier": 1.0,
        },
        "attention": {
            "heads": 4, "kind": "bidirectional", "kv_heads": 0, "head_width": 0, "value_width": 0, "scale": 0.0,
            "windows": [], "sinks": False, "qk_norm": "none", "clip": 0.0, "qkv_bias": False, "out_bias": False,
            "query_rank": 0, "latent_rank": 0, "latent_eps": 1e-6,
        },
        "router": {
            "experts": 8, "top_k": 2, "score": "softmax", "renormalise": True, "bias": False, "selection_bias": False,
            "groups": 1, "kept_groups": 1, "group_score": "max", "scale": 1.0, "jitter": 0.01,
        },
        "expert": {"width": 40, "activation": "swiglu", "limit": 7.0, "alpha": 1.702, "bias": False},
        "head": {
            "labels": ["world", "sports"], "pool": "mean_max", "kind": "classifier", "divisor": 1.0, "bias": False,
            "end_ids": [],
        },
        "norm": {"eps": 1e-5, "kind": "layernorm"},
        "rotary": {"frequencies": [], "interleaved": False, "magnitude": 1.0},
        "dense": {"layers": [], "width": 0, "shared_width": 0, "shared_gate": False},
        "residual_multiplier": 1.0,
        "dtype": "float32",
    }  # fmt: skip


def decoder(**stages: Any) -> dict[str, Any]:
    """A language model; `stages` replace entries of its tables, or the tables."""
    values = plain()
    values["attention"] |= {"kind": "grouped", "kv_heads": 2, "head_width": 12}
    values["embedding"] = {"vocab": 100, "learned_positions": False}
    values["head"] = {"kind": "language", "end_ids": [7]}
    for name, entry in stages.items():
        values[name] = values[name] | entry if isinstance(entry, dict) else entry
    return values


def latent(**attention: Any) -> dict[str, Any]:
    return decoder(attention={"kind": "latent", "value_width": 9, "latent_rank": 16, **attention})


def changed(path: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(plain())
    *parents, key = path.split(".")
    table = values
    for parent in parents:
        table = table[parent]
    table[key] = value
    return values


def refusal(values: Any) -> str:
    with pytest.raises(BadCheckpoint) as caught:
        ModelSpec.from_dict(values)
    return str(caught.value)


@settings(deadline=None, database=None)
@given(specs())
def test_a_spec_comes_back_from_plain_values_and_from_json(spec: ModelSpec) -> None:
    assert ModelSpec.from_dict(spec.to_dict()) == spec
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_plain_values_come_back_from_a_spec() -> None:
    values = plain()
    assert ModelSpec.from_dict(values).to_dict() == plain()
    assert values == plain()


def test_plain_values_hold_nothing_but_what_json_knows() -> None:
    values = ModelSpec.from_dict(plain()).to_dict()
    assert json.loads(json.dumps(values)) == values


def test_what_has_a_default_may_be_left_out() -> None:
    values = plain()
    for key in ("norm", "rotary", "dense", "residual_multiplier", "dtype"):
        del values[key]
    values["embedding"] = {"vocab": 100, "bigram_buckets": 64, "bigram_width": 8}
    values["attention"], values["expert"], values["head"] = {"heads": 4}, {"width": 40}, {"labels": ["world", "sports"]}
    values["router"] = {"experts": 8}
    assert ModelSpec.from_dict(values).to_dict() == plain()


@pytest.mark.parametrize("stage", STAGES)
def test_an_unknown_key_is_refused_by_name_and_place(stage: str) -> None:
    message = refusal(changed(f"{stage}.sliding_window", 4096))
    assert "sliding_window" in message
    assert stage in message


def test_unknown_stages_are_refused_by_name_all_at_once() -> None:
    message = refusal({**plain(), "vision": {}, "adapter": {}})
    assert "adapter, vision" in message


@pytest.mark.parametrize(
    "path", ["attention.kind", "router.score", "expert.activation", "head.pool", "head.kind", "norm.kind"]
)
@pytest.mark.parametrize("value", ["cosine", "", "SOFTMAX", None, 1, ["mean"]])
def test_an_unknown_kind_is_refused_by_name_with_the_known_ones(path: str, value: Any) -> None:
    message = refusal(changed(path, value))
    if isinstance(value, str):
        assert f"{path} = " in message
        assert "known: " in message
    else:
        assert f"{path} must be of type str" in message


@pytest.mark.parametrize("size", [0, -1, -48])
@pytest.mark.parametrize(
    "path",
    [
        "width", "layers", "context", "embedding.vocab", "attention.heads",
        "router.experts", "router.top_k", "expert.width", "norm.eps",
    ],
)  # fmt: skip
def test_a_size_that_is_not_positive_is_refused_by_name(path: str, size: int) -> None:
    assert path in refusal(changed(path, size))


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("router.top_k", 9, "router.top_k must be in [1, 8], not 9"),
        ("attention.heads", 5, "width must be a multiple of attention.heads"),
        ("width", 50, "width must be a multiple of attention.heads"),
        ("width", 1, "width must be at least 2"),
        ("embedding.bigram_buckets", 0, "bigram"),
        ("embedding.bigram_width", 0, "bigram"),
        ("head.labels", [], "head.labels"),
        ("head.labels", ["world"], "head.labels"),
        ("head.labels", ["world", "sports", "world"], "head.labels"),
        ("norm.eps", float("nan"), "norm.eps"),
    ],
)
def test_sizes_that_do_not_fit_together_are_refused_by_name(path: str, value: Any, named: str) -> None:
    assert named in refusal(changed(path, value))


@pytest.mark.parametrize(
    "path",
    [
        "width", "layers", "context", "embedding", "attention", "router", "expert", "head",
        "embedding.vocab", "attention.heads", "expert.width",
    ],
)  # fmt: skip
def test_a_missing_key_is_refused_by_name(path: str) -> None:
    values = plain()
    *parents, key = path.split(".")
    del (values[parents[0]] if parents else values)[key]
    message = refusal(values)
    assert message.endswith(f"misses: {key}")
    assert all(parent in message for parent in parents)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("value", [None, 7, "swiglu", ["heads", 4]])
def test_a_stage_that_is_no_table_is_refused_by_name(stage: str, value: Any) -> None:
    assert f"{stage} must be a table" in refusal(changed(stage, value))


@pytest.mark.parametrize("path", ["width", "embedding.vocab", "attention.heads", "router.top_k", "expert.width"])
@pytest.mark.parametrize("value", ["48", None, [48], {"size": 48}])
def test_a_size_that_is_no_number_is_refused_and_its_place_named(path: str, value: Any) -> None:
    assert f"{path} must be" in refusal(changed(path, value))


@pytest.mark.parametrize(("buckets", "width"), [(-5, -3), (-5, 0), (0, -3)])
def test_negative_bigram_tables_are_refused_by_name(buckets: int, width: int) -> None:
    values = plain()
    values["embedding"].update(bigram_buckets=buckets, bigram_width=width)
    assert "bigram" in refusal(values)


@pytest.mark.parametrize(
    ("path", "value"),
    [("width", 48.0), ("layers", 1.5), ("context", 128.5), ("embedding.vocab", float("inf")), ("expert.width", 0.5),
     ("router.top_k", 1.5), ("layers", True), ("router.renormalise", "no"), ("norm.eps", float("inf"))],
)  # fmt: skip
def test_a_size_that_is_no_whole_number_is_refused_by_name(path: str, value: Any) -> None:
    assert path in refusal(changed(path, value))


@pytest.mark.parametrize("path", ["width", "embedding.vocab", "router.top_k", "expert.width"])
def test_a_size_that_is_no_number_is_refused_by_name(path: str) -> None:
    assert path in refusal(changed(path, "48"))


@pytest.mark.parametrize("labels", ["ab", {"world": 0, "sports": 1}, [1, 2]])
def test_labels_that_are_no_list_of_names_are_refused_by_name(labels: Any) -> None:
    assert "head.labels" in refusal(changed("head.labels", labels))


@pytest.mark.parametrize("values", [None, 7, "spec", ["width", 48]])
def test_a_spec_that_is_no_table_is_refused(values: Any) -> None:
    assert "must be a table" in refusal(values)


def test_the_spec_is_read_without_torch() -> None:
    command = "import expertmesh.model.spec, sys; sys.exit('torch' in sys.modules)"
    root = Path(expertmesh.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", command], cwd=root, check=False).returncode == 0


# Decoders


@pytest.mark.parametrize("name", SPECS)
def test_specs_of_decoders_come_back_from_json(name: str) -> None:
    spec = SPECS[name]
    assert ModelSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


def test_a_decoder_generates_and_a_classifier_does_not() -> None:
    assert ModelSpec.from_dict(decoder()).generates
    assert not ModelSpec.from_dict(plain()).generates
    assert ModelSpec.from_dict(decoder()).attention.is_causal
    assert not ModelSpec.from_dict(plain()).attention.is_causal


def test_layers_are_sparse_unless_they_are_dense() -> None:
    assert ModelSpec.from_dict(decoder()).sparse_layers == (0, 1)
    assert ModelSpec.from_dict(decoder(dense={"layers": [0], "width": 64})).sparse_layers == (1,)


def test_every_layer_has_its_window() -> None:
    spec = ModelSpec.from_dict(decoder(attention={"windows": [128, 0]}))
    assert [spec.attention.window(layer) for layer in (0, 1)] == [128, 0]
    assert ModelSpec.from_dict(decoder()).attention.window(1) == 0


@pytest.mark.parametrize(
    ("values", "named"),
    [
        (decoder(attention={"kv_heads": 3}), "attention.heads must be a multiple of attention.kv_heads"),
        (decoder(attention={"kv_heads": 0}), "attention.kv_heads"),
        (decoder(attention={"head_width": 0}), "attention.head_width"),
        (decoder(attention={"windows": [128]}), "attention.windows needs one number for each layer"),
        (decoder(attention={"windows": [128, -1]}), "attention.windows"),
        (decoder(attention={"windows": [128, 0.5]}), "attention.windows[1] must be of type int"),
        (decoder(attention={"scale": -1.0}), "attention.scale"),
        (decoder(attention={"clip": -1.0}), "attention.clip"),
        (decoder(attention={"qk_norm": "l2"}), "attention.qk_norm = 'l2' is not known; known: none, head, flat"),
        (latent(latent_rank=0), "latent attention needs latent_rank"),
        (latent(value_width=0), "value_width"),
        (latent(query_rank=-1), "attention.query_rank"),
        (latent(qk_norm="head"), "latent attention has no qk_norm"),
        (latent(clip=1.0), "no clip"),
        (decoder(rotary={"frequencies": [1.0] * 7}), "rotary.frequencies are more than a head has pairs"),
        (decoder(rotary={"frequencies": [1.0, "fast"]}), "rotary.frequencies[1] must be of type float"),
        (decoder(rotary={"frequencies": [float("inf")]}), "rotary.frequencies[0] must be finite"),
        (decoder(rotary={"magnitude": float("nan")}), "rotary.magnitude must be finite"),
        (decoder(router={"score": "sparsemixer", "top_k": 1}), "a sparsemixer router takes 2 experts"),
        (decoder(router={"groups": 3}), "router.experts must divide into router.groups"),
        (decoder(router={"groups": 4, "kept_groups": 5}), "router.kept_groups must be in [1, router.groups]"),
        (decoder(router={"groups": 4, "kept_groups": 1, "top_k": 3}), "more than the experts of the kept groups"),
        (decoder(router={"groups": 8, "kept_groups": 4, "group_score": "top2"}), "top2 needs groups of two experts"),
        (decoder(router={"group_score": "mean"}), "router.group_score = 'mean' is not known; known: max, top2"),
        (decoder(expert={"limit": 0.0}), "expert.limit"),
        (decoder(dense={"layers": [2], "width": 64}), "dense.layers"),
        (decoder(dense={"layers": [1, 0], "width": 64}), "dense.layers must ascend"),
        (decoder(dense={"layers": [0, 0], "width": 64}), "dense.layers must ascend"),
        (decoder(dense={"layers": [0]}), "dense.layers and dense.width go together"),
        (decoder(dense={"width": 64}), "dense.layers and dense.width go together"),
        (decoder(dense={"shared_gate": True}), "dense.shared_gate needs dense.shared_width"),
        (decoder(dense={"shared_width": -1}), "dense widths"),
        (decoder(head={"divisor": 0.0}), "head.divisor"),
        (decoder(head={"end_ids": [100]}), "head.end_ids must be in the vocabulary"),
        (decoder(head={"end_ids": [-1]}), "head.end_ids must be in the vocabulary"),
        (decoder(dtype="float16"), "dtype = 'float16' is not known; known: float32, bfloat16"),
        (decoder(attention={"kind": "bidirectional"}), "a language head goes with causal attention"),
        (changed("attention.kind", "grouped") | {"attention": decoder()["attention"]}, "a language head goes with"),
        (changed("rotary.frequencies", [1.0]), "bidirectional attention has no rotation"),
        (changed("dense", {"layers": [0], "width": 64}), "bidirectional attention has no rotation or dense layers"),
        (changed("dtype", "bfloat16"), "bidirectional attention is computed in float32"),
    ],
)
def test_what_does_not_fit_a_decoder_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    assert named in refusal(values)
