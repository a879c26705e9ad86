"""Every switch of a spec matters, and the comparison with the plain model notices: a model that misreads one gives
logits that are further away than the tolerance of any comparison."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expertmesh.checkpoint.load import StageLoader
from expertmesh.checkpoint.split import split
from expertmesh.model import gating, invariant
from expertmesh.model.full import FullModel
from expertmesh.model.router import route
from expertmesh.model.spec import DenseSpec, ExpertSpec, ModelSpec, RotarySpec, RouterSpec
from tests import plain
from tests.decoders import CPU, SPECS, frequencies, full_model, random_model, texts, whole_logits

TOLERANCE = 2e-4  # of comparisons with transformers
LENGTH = 170
CHECKPOINTS = Path(__file__).parent / "fixtures" / "checkpoints"

State = dict[str, Tensor]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Mutation:
    """A misreading of one of `SPECS`.

    Attributes:
        name: Of the spec.
        what: Is misread.
        spec: As it is read.
        state: What becomes of its tensors.
    """

    name: str
    what: str
    spec: ModelSpec
    state: Callable[[State], State] = dict


def of(name: str, what: str, state: Callable[[State], State] = dict, **stages: Any) -> Mutation:
    """A misreading: fields of a stage as a dict, or a field of the model."""
    return Mutation(name, what, changed(SPECS[name], stages), state)


def changed(spec: ModelSpec, stages: dict[str, Any]) -> ModelSpec:
    """A spec with other values in some of its stages."""
    changes = {
        key: replace(getattr(spec, key), **value) if isinstance(value, dict) else value for key, value in stages.items()
    }
    return replace(spec, **changes)


def renamed(*pairs: tuple[str, str]) -> Callable[[State], State]:
    """Tensors under other names; names that both sides of a pair have are swapped."""

    def rename(state: State) -> State:
        renamed_state = {}
        for name, value in state.items():
            for one, other in pairs:
                if one in name or other in name:
                    name = name.replace(one, other) if one in name else name.replace(other, one)
                    break
            renamed_state[name] = value
        return renamed_state

    return rename


def flat_norms(state: State) -> State:
    """The norms of a head, repeated for each."""
    return {
        key: value.repeat(4) if ".q_norm." in key else value.repeat(2) if ".k_norm." in key else value
        for key, value in state.items()
    }


def reversed_key_heads(state: State) -> State:
    """Query heads get the keys and values of others."""
    return {
        key: value.unflatten(0, (2, -1)).flip(0).flatten(0, 1) if key.split(".")[-2] in ("k", "v") else value
        for key, value in state.items()
    }


ROTATED_SIX = frequencies(6)

MUTATIONS = [
    of("grouped", "eps", norm={"eps": 1e-5}),
    of("grouped", "a nearby eps", norm={"eps": 2e-3}),
    of("layer norm", "eps of layer norm", norm={"eps": 1e-5}),
    of("latent", "latent eps", attention={"latent_eps": 1e-6}),
    of("latent", "latent eps as the norm's", attention={"latent_eps": 1e-3}),
    of("layer norm", "rms for layer norm", norm={"kind": "rms"}),
    of("grouped", "layer norm for rms", norm={"kind": "layernorm"}),
    of("grouped", "gate and up swapped", renamed((".gate.", ".up."))),
    of("clamped", "clamped gate and up swapped", renamed((".gate.", ".up."))),
    of("dense layers", "dense gate and up swapped", renamed((".dense.gate.", ".dense.up."))),
    of("shared expert", "shared gate and up swapped", renamed((".shared.gate.", ".shared.up."))),
    of("narrow window", "narrow window too short", attention={"windows": (4, 5)}),
    of("narrow window", "narrow window too long", attention={"windows": (5, 6)}),
    of("narrow window", "no window", attention={"windows": ()}),
    of("window", "window too short", attention={"windows": (149, 150)}),
    of("window", "window too long", attention={"windows": (150, 151)}),
    of("alternating windows", "windows of other layers", attention={"windows": (0, 20)}),
    of("alternating windows", "windows everywhere", attention={"windows": (20, 20)}),
    of("clamped with windows and sinks", "window of a block off by one", attention={"windows": (127, 0)}),
    of("scale", "scale", attention={"scale": 0.0}),
    of("latent without query rank", "latent scale", attention={"scale": 0.0}),
    of("latent", "latent scale without the rotated part", attention={"scale": 12**-0.5}),
    of("grouped", "theta", rotary={"frequencies": frequencies(6, theta=5_000.0)}),
    of("grouped", "one frequency", rotary={"frequencies": (*ROTATED_SIX[:5], ROTATED_SIX[5] / 2)}),
    of("magnitude", "magnitude", rotary={"magnitude": 1.0}),
    of("grouped", "halves taken as neighbours", rotary={"interleaved": True}),
    of("interleaved", "neighbours taken as halves", rotary={"interleaved": False}),
    of("latent", "latent neighbours taken as halves", rotary={"interleaved": False}),
    of("partial rotary", "all of a head turned", rotary={"frequencies": ROTATED_SIX}),
    of("grouped", "half of a head turned", rotary={"frequencies": frequencies(3)}),
    of("grouped", "not turned", rotary=RotarySpec()),
    of("no rotation", "turned", rotary=RotarySpec(ROTATED_SIX)),
    of("qk norm of a head", "no norm of a head", attention={"qk_norm": "none"}),
    of("qk norm of a head", "flat norm for a head's", flat_norms, attention={"qk_norm": "flat"}),
    of("flat qk norm", "no flat norm", attention={"qk_norm": "none"}),
    of("flat qk norm", "a head's norm for the flat one",
       lambda state: {key: value[:12] if "k_norm" in key or "q_norm" in key else value for key, value in state.items()},
       attention={"qk_norm": "head"}),
    of("clip", "clip", attention={"clip": 0.0}),
    of("flat qk norm and clip", "clip behind a norm", attention={"clip": 0.0}),
    of("sinks", "sinks", attention={"sinks": False}),
    of("biases of attention", "biases of queries, keys and values", attention={"qkv_bias": False}),
    of("biases of attention", "bias of attention's output", attention={"out_bias": False}),
    of("grouped", "owners of key heads", reversed_key_heads),
    of("softmax", "sigmoid for softmax", router={"score": "sigmoid"}),
    of("raw weights", "softmax of the best for raw softmax", router={"score": "softmax_top"}),
    of("sigmoid", "softmax for sigmoid", router={"score": "softmax"}),
    of("sparsemixer", "softmax for sparsemixer", router={"score": "softmax"}),
    of("softmax", "weights not renormalised", router={"renormalise": False}),
    of("raw weights", "weights renormalised", router={"renormalise": True}),
    of("sigmoid", "sigmoid weights not renormalised", router={"renormalise": False}),
    of("raw sigmoid", "sigmoid weights renormalised", router={"renormalise": True}),
    of("groups by top2", "scale of weights", router={"scale": 1.0}),
    of("groups by max", "scale of softmax weights", router={"scale": 1.0}),
    of("groups by max", "groups", router={"groups": 1, "kept_groups": 1}),
    of("groups by top2", "groups with bias", router={"groups": 1, "kept_groups": 1}),
    of("groups by top2", "max for top2", router={"group_score": "max"}),
    of("groups by max", "top2 for max", router={"group_score": "top2"}),
    of("groups by max", "one kept group more", router={"kept_groups": 3}),
    of("selection bias", "selection bias", router={"selection_bias": False}),
    of("biased router", "bias of the router", router={"bias": False}),
    of("sparsemixer", "jitter", router={"jitter": 0.01}),
    of("grouped", "one expert too few", router={"top_k": 1}),
    of("grouped", "one expert too many", router={"top_k": 3}),
    of("shared expert", "shared expert", dense=DenseSpec()),
    of("gated shared expert", "gate of the shared expert", dense={"shared_gate": False}),
    of("dense layer and shared expert", "shared expert beside a dense layer", dense={"shared_width": 0}),
    of("dense layers", "a dense layer taken as a sparse one", dense={"layers": (2,)}),
    of("dense layers", "a sparse layer taken as a dense one", dense={"layers": (0, 1, 2)}),
    of("multipliers", "residual multiplier", residual_multiplier=1.0),
    of("multipliers", "embedding multiplier", embedding={"multiplier": 1.0}),
    of("multipliers", "divisor of the head", head={"divisor": 1.0}),
    of("biased head", "bias of the head", head={"bias": False}),
    of("learned positions", "learned positions", embedding={"learned_positions": False}),
    of("clamped", "limit", expert={"limit": 7.0}),
    of("clamped", "alpha", expert={"alpha": 1.0}),
    of("clamped", "plain activation", expert={"activation": "swiglu"}),
    of("biases of experts", "biases of experts", expert=ExpertSpec(36)),
    of("grouped", "clamped activation", expert={"activation": "swiglu_clamped"}),
    of("grouped", "bfloat16", dtype="bfloat16"),
]  # fmt: skip


@functools.cache
def plain_logits(name: str) -> np.ndarray:
    """What the plain model gives for one of `SPECS`."""
    right = full_model(name)
    return plain.logits(right.spec, plain.weights_of(right), the_ids().numpy())


def the_ids() -> Tensor:
    (ids_T,) = texts([LENGTH], seed=1)
    return ids_T


def distance(model: FullModel, name: str) -> float:
    """How far a model's logits are from what the plain model gives for one of `SPECS`."""
    return float(np.abs(whole_logits(model, the_ids()).numpy() - plain_logits(name)).max())


def with_tensors_of(state: State, model: FullModel) -> FullModel:
    """A model with the tensors of another as far as it has such, and its own where the other has not."""
    own = model.state_dict().keys()
    model.load_state_dict({name: value for name, value in state.items() if name in own}, strict=False)
    return model


def mutant(mutation: Mutation) -> FullModel:
    """The misread model: with the right one's tensors where it has such, with random ones where it has not."""
    state = mutation.state(dict(full_model(mutation.name).state_dict()))
    return with_tensors_of(state, random_model(mutation.spec, seed=1))


@pytest.mark.parametrize("name", sorted({mutation.name for mutation in MUTATIONS}))
def test_what_is_read_rightly_is_well_within_the_tolerance(name: str) -> None:
    assert distance(mutant(of(name, "nothing")), name) < TOLERANCE / 4


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.what)
def test_what_is_misread_is_noticed(mutation: Mutation) -> None:
    assert distance(mutant(mutation), mutation.name) > 2 * TOLERANCE


def weighed_by_biased_scores(
    logits_TE: Tensor, spec: RouterSpec, selection_bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The right experts, with weights that have the bias for choosing in them."""
    ids_TK, _ = route(logits_TE, spec, selection_bias_E)
    weights_TK = (invariant.sigmoid(logits_TE) + selection_bias_E).gather(1, ids_TK)
    return ids_TK, spec.scale * weights_TK / weights_TK.sum(dim=1, keepdim=True)


def test_a_selection_bias_in_the_weights_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gating, "route", weighed_by_biased_scores)
    assert distance(full_model("selection bias"), "selection bias") > 2 * TOLERANCE


# The same for models that transformers made, against what transformers computed.

THEIRS: list[tuple[str, str, dict[str, Any]]] = [
    *((name, "eps", {"norm": {"eps": 1e-5}}) for name in ("mixtral", "olmoe", "qwen3_moe", "deepseek_v3")),
    *((name, "a usual eps", {"norm": {"eps": 1e-6}}) for name in ("mixtral", "olmoe", "qwen3_moe", "deepseek_v3")),
    *((name, "not turned", {"rotary": RotarySpec()}) for name in ("mixtral", "olmoe", "qwen3_moe")),
    *((name, "neighbours", {"rotary": {"interleaved": True}}) for name in ("mixtral", "olmoe", "qwen3_moe")),
    ("mixtral", "a window", {"attention": {"windows": (31, 31, 31)}}),
    ("deepseek_v3", "a window", {"attention": {"windows": (31, 31, 31, 31)}}),
    *((name, "scale", {"attention": {"scale": 0.2}}) for name in ("mixtral", "olmoe", "qwen3_moe", "deepseek_v3")),
    *((name, "top 1", {"router": {"top_k": 1}}) for name in ("mixtral", "olmoe", "qwen3_moe", "deepseek_v3")),
    *((name, "top 3", {"router": {"top_k": 3}}) for name in ("mixtral", "olmoe", "qwen3_moe", "deepseek_v3")),
    *((name, "sigmoid", {"router": {"score": "sigmoid"}}) for name in ("mixtral", "olmoe", "qwen3_moe")),
    *((name, "raw", {"router": {"renormalise": False}}) for name in ("mixtral", "qwen3_moe", "deepseek_v3")),
    ("olmoe", "renormalised", {"router": {"renormalise": True}}),
    ("olmoe", "no flat norm", {"attention": {"qk_norm": "none"}}),
    ("qwen3_moe", "no norm of a head", {"attention": {"qk_norm": "none"}}),
    ("deepseek_v3", "latent eps as the norm's", {"attention": {"latent_eps": 1e-3}}),
    ("deepseek_v3", "scale without yarn", {"attention": {"scale": 0.0}}),
    ("deepseek_v3", "halves", {"rotary": {"interleaved": False}}),
    ("deepseek_v3", "magnitude", {"rotary": {"magnitude": 1.05}}),
    ("deepseek_v3", "frequencies without yarn", {"rotary": {"frequencies": frequencies(8)}}),
    ("deepseek_v3", "softmax", {"router": {"score": "softmax"}}),
    ("deepseek_v3", "no selection bias", {"router": {"selection_bias": False}}),
    ("deepseek_v3", "no groups", {"router": {"groups": 1, "kept_groups": 1}}),
    ("deepseek_v3", "best of a group", {"router": {"group_score": "max"}}),
    ("deepseek_v3", "no scale of weights", {"router": {"scale": 1.0}}),
    ("deepseek_v3", "no shared expert", {"dense": {"shared_width": 0}}),
]  # fmt: skip


@functools.cache
def transformers_model(name: str) -> tuple[FullModel, Tensor, Tensor]:
    """A model that transformers made, token ids and the logits that it gave for them."""
    with tempfile.TemporaryDirectory() as folder:
        split(CHECKPOINTS / name, Path(folder) / name)
        model = StageLoader(Path(folder) / name, CPU).full_model()
    with np.load(CHECKPOINTS / name / "reference.npz") as arrays:
        return model, torch.from_numpy(arrays["input_ids"]).long(), torch.from_numpy(arrays["logits"])


def distance_to_transformers(model: FullModel, name: str) -> float:
    _, ids_BL, wanted = transformers_model(name)
    lengths_B = torch.full((len(ids_BL),), ids_BL.shape[1])
    return float((model.logits(ids_BL.flatten(), lengths_B).view(wanted.shape) - wanted).abs().max())


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3_moe", "deepseek_v3"])
def test_a_model_of_transformers_is_well_within_the_tolerance(name: str) -> None:
    assert distance_to_transformers(transformers_model(name)[0], name) < TOLERANCE / 2


@pytest.mark.parametrize(("name", "what", "changes"), THEIRS, ids=lambda value: value if isinstance(value, str) else "")
def test_a_misread_model_of_transformers_is_noticed(name: str, what: str, changes: dict[str, Any]) -> None:
    right, _, _ = transformers_model(name)
    model = with_tensors_of(dict(right.state_dict()), random_model(changed(right.spec, changes)))
    assert distance_to_transformers(model, name) > TOLERANCE


def test_every_switch_has_a_mutation() -> None:
    """A field that is new in a stage's spec needs one too."""
    misread = set()
    for mutation in MUTATIONS:
        right, wrong = SPECS[mutation.name].to_dict(), mutation.spec.to_dict()
        for key, value in right.items():
            if isinstance(value, dict):
                misread |= {f"{key}.{field}" for field in value if value[field] != wrong[key][field]}
            elif value != wrong[key]:
                misread.add(key)
    fields = {
        name
        for key, value in SPECS["grouped"].to_dict().items()
        for name in ([f"{key}.{field}" for field in value] if isinstance(value, dict) else [key])
    }
    sizes = {
        "width", "layers", "context", "embedding.vocab", "expert.width", "router.experts", "attention.heads",
        "attention.kind", "attention.kv_heads", "attention.head_width", "attention.value_width",
        "attention.query_rank", "attention.latent_rank", "dense.width", "head.kind", "head.end_ids",
    }  # fmt: skip
    of_classifiers = {"embedding.bigram_buckets", "embedding.bigram_width", "head.labels", "head.pool"}
    assert fields - misread == sizes | of_classifiers
