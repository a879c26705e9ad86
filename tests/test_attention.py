from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from expertmesh.dispatch import Gate, Gated
from expertmesh.model.attention import BidirectionalGating, GroupedGating, LatentGating, _by_head, gating_stage
from expertmesh.model.sequences import Sequences
from tests import plain
from tests.decoders import LATENT, PLAIN, SPECS, full_model, random_model, texts, whole_logits
from tests.test_fingerprint import CLASSIFIER

FLOAT32 = [name for name, spec in SPECS.items() if spec.dtype == "float32"]


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


# Whole models against the plain one, which knows no blocks and no cache, and expands the keys of latent attention.


@pytest.mark.parametrize("name", FLOAT32)
def test_the_model_is_the_plain_one_for_every_switch_of_a_spec(name: str) -> None:
    model = full_model(name)
    for length in (1, 2, 140):
        (ids_T,) = texts([length], seed=length)
        wanted = plain.logits(model.spec, plain.weights_of(model), ids_T.numpy())
        np.testing.assert_allclose(whole_logits(model, ids_T).numpy(), wanted, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", [name for name in SPECS if name not in FLOAT32])
def test_a_bfloat16_model_is_near_the_plain_one(name: str) -> None:
    model = full_model(name)
    (ids_T,) = texts([60])
    got, wanted = whole_logits(model, ids_T), plain.logits(model.spec, plain.weights_of(model), ids_T.numpy())
    assert got.dtype == torch.float32
    assert np.median(np.abs(got.numpy() - wanted)) < 0.05
    near = torch.nn.functional.cosine_similarity(got.double(), torch.from_numpy(wanted), dim=1)
    assert near.median() > 0.999


@pytest.mark.parametrize("name", ["grouped", "sinks", "alternating windows", "latent", "latent without query rank"])
def test_attention_alone_is_the_plain_one(name: str) -> None:
    model, seen = full_model(name), []
    (ids_T,) = texts([150], seed=3)
    stage = model.gating[0]
    original = stage.attention

    def noted(x_TD: torch.Tensor, sequences: Sequences) -> torch.Tensor:
        seen.append((x_TD, original(x_TD, sequences)))
        return seen[-1][1]

    stage.attention = noted
    try:
        whole_logits(model, ids_T)
    finally:
        del stage.attention
    ((x_TD, got_TD),) = seen
    wanted = plain.attention(model.spec, plain.weights_of(model).of("gating.0"), 0, x_TD.double().numpy())
    np.testing.assert_allclose(got_TD.numpy(), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dense", ["gated shared expert", "dense layer and shared expert", "clamped"])
def test_what_gating_adds_beside_experts_is_in_the_residual(dense: str) -> None:
    model, gates = full_model(dense), []
    (ids_T,) = texts([9])
    model.logits(ids_T, torch.tensor([9]), lambda call, result: gates.append(result) if type(call) is Gate else None)
    for layer, gated in enumerate(gates):
        assert isinstance(gated, Gated)
        is_dense = layer in model.spec.dense.layers
        parts = (gated.expert_input_TD, gated.expert_ids_TK, gated.weights_TK)
        assert [part is None for part in parts] == [is_dense] * 3


# Training's attention gives the same numbers, not the same bits.


@pytest.mark.parametrize("name", ["grouped", "multi-query", "qk norm of a head", "latent", "latent without query rank"])
def test_training_computes_the_same_model(name: str) -> None:
    model = random_model(SPECS[name])
    lengths = [5, 40, 17, 1]
    ids_T = torch.cat(texts(lengths))
    served = model.logits(ids_T, torch.tensor(lengths))
    trained = model.train().logits(ids_T, torch.tensor(lengths))
    torch.testing.assert_close(trained, served, atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["window", "sinks"])
def test_what_training_does_not_know_it_refuses(name: str) -> None:
    model = random_model(SPECS[name]).train()
    with pytest.raises(AssertionError, match="not trained"):
        model.logits(texts([5])[0], torch.tensor([5]))


def test_gradients_reach_every_tensor() -> None:
    with torch.inference_mode(False):
        for name in ("grouped", "latent", "gated shared expert", "dense layers"):
            model = random_model(replace(SPECS[name], router=replace(SPECS[name].router, top_k=8))).train()
            model.requires_grad_(True)
            model.logits(texts([30])[0], torch.tensor([30])).square().sum().backward()
            missing = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
            assert missing == []


# Kinds


def test_each_kind_of_attention_has_its_stage() -> None:
    assert type(gating_stage(PLAIN, 0)) is GroupedGating
    assert type(gating_stage(LATENT, 0)) is LatentGating
    assert type(gating_stage(CLASSIFIER, 0)) is BidirectionalGating


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("grouped", {"q.weight": (48, 48), "k.weight": (24, 48), "v.weight": (24, 48), "out.weight": (48, 48)}),
        ("sinks", {"sinks": (4,)}),
        ("qk norm of a head", {"q_norm.weight": (12,), "k_norm.weight": (12,)}),
        ("flat qk norm", {"q_norm.weight": (48,), "k_norm.weight": (24,)}),
        ("biases of attention", {"q.bias": (48,), "k.bias": (24,), "v.bias": (24,), "out.bias": (48,)}),
        ("latent", {"q_down.weight": (20, 48), "q_down_norm.weight": (20,), "q_up.weight": (80, 20)}),
        ("latent", {"kv_down.weight": (26, 48), "latent_norm.weight": (18,), "kv_up.weight": (88, 18)}),
        ("latent", {"out.weight": (48, 40)}),
        ("latent without query rank", {"q.weight": (80, 48)}),
        ("dense layers", {"dense.gate.weight": (52, 48), "dense.up.weight": (52, 48), "dense.down.weight": (48, 52)}),
        ("gated shared expert", {"shared.down.weight": (48, 28), "shared_gate.weight": (1, 48)}),
        ("selection bias", {"selection_bias": (8,), "router.weight": (8, 48)}),
        ("layer norm", {"attention_norm.bias": (48,), "expert_norm.bias": (48,)}),
    ],
)
def test_tensors_have_the_names_and_shapes_of_parts(name: str, wanted: dict[str, tuple[int, ...]]) -> None:
    shapes = {key: tuple(value.shape) for key, value in gating_stage(SPECS[name], 0).state_dict().items()}
    assert shapes == shapes | wanted


def test_a_dense_layer_has_neither_router_nor_experts() -> None:
    model = full_model("dense layer and shared expert")
    assert not hasattr(model.gating[0], "router")
    assert not hasattr(model.gating[0], "shared")
    assert (len(model.experts[0]), len(model.experts[1])) == (0, 8)


def test_rows_of_each_head_are_multiplied_with_its_own_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    x_THi, weight_Hio = torch.randn(7, 3, 5, generator=generator), torch.randn(3, 5, 4, generator=generator)
    wanted = torch.einsum("thi,hio->tho", x_THi.double(), weight_Hio.double())
    torch.testing.assert_close(_by_head(x_THi, weight_Hio).double(), wanted, atol=1e-5, rtol=1e-5)


def test_norms_router_sinks_and_stream_stay_in_float32_in_a_bfloat16_model() -> None:
    spec = replace(
        SPECS["clamped with windows and sinks"],
        dtype="bfloat16",
        attention=replace(SPECS["sinks"].attention, qk_norm="head"),
        router=replace(PLAIN.router, score="sigmoid", selection_bias=True, bias=True),
    )
    model = random_model(spec)
    wide = {"attention_norm", "expert_norm", "norm", "q_norm", "k_norm", "router", "sinks", "selection_bias"}
    for name, value in model.state_dict().items():
        is_wide = bool(wide & set(name.split(".")))
        assert value.dtype == (torch.float32 if is_wide else torch.bfloat16), name
    seen: list[torch.dtype] = []

    def observe(call: object, result: object) -> None:
        if isinstance(result, Gated):
            seen.extend([result.residual_TD.dtype, result.weights_TK.dtype, result.expert_input_TD.dtype])

    model.logits(texts([5])[0], torch.tensor([5]), observe)
    assert seen == [torch.float32, torch.float32, torch.bfloat16] * 2
