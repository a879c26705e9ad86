"""Imported checkpoints compute what transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch

from expertmesh.checkpoint.load import StageLoader
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.dispatch import Gate, Gated, StageCall
from expertmesh.model.full import FullModel
from expertmesh.model.layers import Joint
from expertmesh.model.spec import ModelSpec
from tests import families

TOLERANCE = 1e-4
HUB = [name for name, layout in families.ALL if layout == "hub"]


@pytest.mark.parametrize("name", HUB)
def test_logits_hidden_states_and_routes_are_those_of_transformers(name: str) -> None:
    expected = families.reference(name)
    model = StageLoader(families.model(name), torch.device("cpu")).full_model()
    rows, length = expected["input_ids"].shape
    seen: dict[int, tuple[torch.Tensor, Gated]] = {}

    def observe(call: StageCall, result: Gated) -> None:
        if isinstance(call, Gate):
            seen[call.layer] = call.x_TD, result

    with torch.inference_mode():
        logits_TV = model.logits(torch.tensor(expected["input_ids"]).flatten(), torch.tensor([length] * rows), observe)
    assert expected["logits"].std() > 0.5, "logits this small would hide differences"
    for layer, (x_TD, _) in seen.items():
        np.testing.assert_allclose(x_TD, expected["hidden_states"][layer].reshape(x_TD.shape), 0, TOLERANCE)
    for number, layer in enumerate(model.spec.sparse_layers):
        gated = seen[layer][1]
        order = np.argsort(expected[f"route_{number}_index"], axis=1)
        np.testing.assert_array_equal(
            gated.expert_ids_TK, np.take_along_axis(expected[f"route_{number}_index"], order, 1)
        )
        weights_TK = np.take_along_axis(expected[f"route_{number}_weight"], order, 1)
        np.testing.assert_allclose(gated.weights_TK, weights_TK, 0, TOLERANCE)
    np.testing.assert_allclose(logits_TV, expected["logits"].reshape(logits_TV.shape), 0, TOLERANCE)


def change(stage: str, **values: Any) -> Callable[[ModelSpec], ModelSpec]:
    """An edit of one stage's part of the spec; of the spec itself for the stage `model`."""
    if stage == "model":
        return lambda spec: replace(spec, **values)
    return lambda spec: replace(spec, **{stage: replace(getattr(spec, stage), **values)})


def windows(step: int) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: change("attention", windows=tuple(w and w + step for w in spec.attention.windows))(spec)


def frequencies(spec: ModelSpec) -> ModelSpec:
    return change("rotary", frequencies=tuple(1.01 * angle for angle in spec.rotary.frequencies))(spec)


MUTATIONS: list[tuple[str, Callable[[ModelSpec], ModelSpec]]] = [
    ("mixtral", change("norm", eps=1e-3)),
    ("mixtral", change("router", renormalise=False)),
    ("mixtral", change("router", top_k=1)),
    ("mixtral", change("rotary", interleaved=True)),
    ("mixtral", frequencies),
    ("mixtral", change("attention", scale=0.3)),
    ("mixtral_window", windows(1)),
    ("mixtral_window", windows(-1)),
    ("olmoe", change("router", renormalise=True)),
    ("olmoe_clip", change("attention", clip=0.0)),
    ("qwen2_moe", windows(1)),
    ("qwen2_moe", lambda spec: change("attention", windows=(*spec.attention.windows[::-1][1:], 0))(spec)),
    ("deepseek_v2", change("router", renormalise=True)),
    ("deepseek_v2", change("attention", latent_eps=3e-3)),
    ("deepseek_v2", change("attention", scale=14**-0.5)),
    ("deepseek_v2", change("rotary", interleaved=False)),
    ("deepseek_v2_groups", change("router", kept_groups=2)),
    ("deepseek_v2_groups", change("router", scale=1.0)),
    ("deepseek_v3", change("rotary", magnitude=1.0)),
    ("deepseek_v3", change("router", kept_groups=4)),
    ("deepseek_v3", change("router", group_score="max")),
    ("deepseek_v3_halves", change("rotary", interleaved=True)),
    ("granitemoe", change("embedding", multiplier=1.0)),
    ("granitemoe", change("model", residual_multiplier=1.0)),
    ("granitemoe", change("attention", scale=0.0)),
    ("granitemoe", change("head", divisor=1.0)),
    ("phimoe", change("router", jitter=0.3)),
    ("phimoe", change("router", score="softmax")),
    ("phimoe", change("rotary", magnitude=1.0)),
    ("gpt_oss", change("expert", limit=7.0)),
    ("gpt_oss", change("expert", alpha=1.0)),
    ("gpt_oss", change("router", score="softmax", renormalise=False)),
    ("gpt_oss", windows(1)),
]


@pytest.mark.parametrize("case", range(len(MUTATIONS)))
def test_a_switch_that_is_wrong_is_seen_in_the_logits(case: int) -> None:
    name, mutate = MUTATIONS[case]
    loader = StageLoader(families.model(name), torch.device("cpu"))
    loader.spec = mutate(loader.spec)
    assert difference(loader.full_model(), name) > 10 * TOLERANCE


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "glm4_moe"])
def test_experts_with_gate_and_up_swapped_are_seen(name: str) -> None:
    model = StageLoader(families.model(name), torch.device("cpu")).full_model()
    expert: Any = model.experts[model.spec.sparse_layers[0]][0]
    expert.gate_and_up = Joint(expert.up, expert.gate)
    assert difference(model, name) > 10 * TOLERANCE


def difference(model: FullModel, name: str) -> float:
    """The largest difference of a logit from the reference."""
    ids, expected = (families.reference(name)[key] for key in ("input_ids", "logits"))
    with torch.inference_mode():
        logits_TV = model.logits(torch.tensor(ids).flatten(), torch.tensor([ids.shape[1]] * ids.shape[0]))
    return float(np.abs(logits_TV.numpy() - expected.reshape(logits_TV.shape)).max())


@pytest.mark.parametrize("name", families.CHECKPOINTS)
def test_both_layouts_give_the_same_bytes(name: str) -> None:
    hub, fused = (Manifest.read(families.model(name, layout)) for layout in families.LAYOUTS)
    assert hub.digest == fused.digest
    names = [
        {key for shard in families.checkpoint(name, layout).glob("*.safetensors") for key in _names(shard)}
        for layout in families.LAYOUTS
    ]
    assert (names[0] == names[1]) == name.startswith("gpt_oss"), "the layouts were meant to differ"


def _names(shard: Path) -> set[str]:
    with safetensors.safe_open(shard, framework="np") as file:
        return set(file.keys())
