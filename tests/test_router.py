from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from expertmesh.model.router import route
from expertmesh.model.spec import RouterSpec
from tests import plain

SOFTMAX, SIGMOID = RouterSpec(8, 2), RouterSpec(8, 2, "sigmoid")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def row(*logits: float) -> Tensor:
    return torch.tensor([logits], dtype=torch.float32)


@st.composite
def routers(draw: st.DrawFn) -> RouterSpec:
    score = draw(st.sampled_from(["softmax", "softmax_top", "sigmoid", "sparsemixer"]))
    if score == "sparsemixer":
        return RouterSpec(draw(st.integers(2, 20)), 2, score, jitter=draw(st.sampled_from([0.01, 0.1, 0.5])))
    groups, size = draw(st.integers(1, 5)), draw(st.integers(2, 8))
    kept = draw(st.integers(1, groups))
    return RouterSpec(
        groups * size,
        draw(st.integers(1, kept * size)),
        score,
        renormalise=draw(st.booleans()),
        groups=groups,
        kept_groups=kept,
        group_score=draw(st.sampled_from(["max", "top2"])),
        scale=draw(st.sampled_from([1.0, 2.5])),
    )


def assert_routes_as_plain(spec: RouterSpec, logits_TE: Tensor, bias_E: Tensor | None = None) -> None:
    ids_TK, weights_TK = route(logits_TE, spec, bias_E)
    assert (ids_TK.dtype, weights_TK.dtype) == (torch.int64, torch.float32)
    assert (ids_TK[:, 1:] > ids_TK[:, :-1]).all()
    bias = None if bias_E is None else bias_E.double().numpy()
    for logits_E, ids_K, weights_K in zip(logits_TE.double().numpy(), ids_TK, weights_TK, strict=True):
        wanted = plain.routes(spec, logits_E, bias)
        assert ids_K.tolist() == sorted(wanted)
        np.testing.assert_allclose(weights_K.numpy(), [wanted[e] for e in ids_K.tolist()], rtol=1e-5, atol=1e-7)


@settings(max_examples=300, deadline=None, database=None)
@given(routers(), st.booleans(), st.integers(0, 2**31))
def test_every_rule_is_the_plain_one(spec: RouterSpec, biased: bool, seed: int) -> None:
    bias_E = 0.3 * normal(spec.experts, seed=seed + 1) if biased and spec.score != "sparsemixer" else None
    assert_routes_as_plain(spec, normal(9, spec.experts, seed=seed), bias_E)


# By hand


def test_softmax_weighs_the_best_by_their_share() -> None:
    ids, weights = route(row(0, 3, 1, -2, 2, 0, 0, 0), replace(SOFTMAX, renormalise=False))
    assert ids.tolist() == [[1, 4]]
    torch.testing.assert_close(weights, torch.softmax(row(0, 3, 1, -2, 2, 0, 0, 0), dim=1)[:, [1, 4]])
    torch.testing.assert_close(route(row(0, 3, 1, -2, 2, 0, 0, 0), SOFTMAX)[1], torch.softmax(row(3, 2), dim=1))


def test_softmax_of_the_best_is_renormalised_softmax() -> None:
    logits = normal(50, 8)
    ids, weights = route(logits, replace(SOFTMAX, score="softmax_top"))
    wanted_ids, wanted = route(logits, SOFTMAX)
    assert torch.equal(ids, wanted_ids)
    torch.testing.assert_close(weights, wanted)


def test_a_selection_bias_chooses_and_does_not_weigh() -> None:
    logits, bias = row(2, 1, 0, -1, -2, -3, -4, -5), torch.zeros(8)
    bias[7] = 5.0
    ids, weights = route(logits, replace(SIGMOID, renormalise=False), bias)
    assert ids.tolist() == [[0, 7]]
    torch.testing.assert_close(weights, torch.sigmoid(row(2, -5)))


def test_experts_outside_the_kept_groups_are_not_chosen_even_if_a_bias_makes_all_scores_negative() -> None:
    spec = replace(SIGMOID, groups=4, kept_groups=1, group_score="top2")
    bias = torch.full((8,), -3.0)
    ids, _ = route(row(9, -9, 1, 1, 0, 0, -1, -1), spec, bias)
    assert ids.tolist() == [[2, 3]]  # the best pair; the best expert has a bad mate
    ids, _ = route(row(9, -9, 1, 1, 0, 0, -1, -1), replace(spec, group_score="max"), bias)
    assert ids.tolist() == [[0, 1]]


def test_the_scale_is_last() -> None:
    for spec in (SOFTMAX, SIGMOID, replace(SOFTMAX, score="softmax_top"), replace(SOFTMAX, score="sparsemixer")):
        logits = normal(20, 8)
        torch.testing.assert_close(route(logits, replace(spec, scale=2.5))[1], 2.5 * route(logits, spec)[1])


def test_sigmoid_weights_of_experts_that_nobody_wants_are_finite() -> None:
    _, weights = route(torch.full((1, 8), -200.0), SIGMOID)
    assert weights.isfinite().all()


def test_a_sparsemixer_counts_only_experts_near_the_best() -> None:
    spec = replace(SOFTMAX, score="sparsemixer", jitter=0.1)
    ids, weights = route(row(1.0, 0.9, 0.5, 0.42, 0, 0, 0, 0), spec)
    assert ids.tolist() == [[0, 1]]
    wanted = [torch.softmax(row(1.0, 0.9), dim=1)[0, 0], 1.0]
    torch.testing.assert_close(weights, torch.tensor([wanted]))


def test_no_rows_have_no_routes() -> None:
    for score in ("softmax", "softmax_top", "sigmoid", "sparsemixer"):
        ids, weights = route(torch.empty(0, 8), RouterSpec(8, 2, score))
        assert ids.shape == weights.shape == (0, 2)


# Against the routers of transformers. Their matrix is the identity here, so that they are given scores.


def theirs(module: Any, logits_TE: Tensor, *more: Tensor) -> tuple[Tensor, Tensor]:
    """Their choices, ascending, and weights."""
    weights = dict(module.named_parameters())["weight"]
    torch.nn.init.eye_(weights)
    with torch.inference_mode():
        _, weights_TK, ids_TK = module.eval()(logits_TE, *more)
    ids_TK, order_TK = torch.sort(ids_TK, dim=1)
    return ids_TK, weights_TK.gather(1, order_TK)


def assert_same(
    spec: RouterSpec, wanted: tuple[Tensor, Tensor], logits_TE: Tensor, bias_E: Tensor | None = None
) -> None:
    ids_TK, weights_TK = route(logits_TE, spec, bias_E)
    assert torch.equal(ids_TK, wanted[0])
    torch.testing.assert_close(weights_TK, wanted[1], rtol=1e-6, atol=1e-7)


def config(experts: int, top_k: int, **more: Any) -> Any:
    names = ("num_local_experts", "num_experts", "hidden_size")
    return SimpleNamespace(num_experts_per_tok=top_k, **dict.fromkeys(names, experts), **more)


LOGITS = 2 * normal(400, 16, seed=5)


@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize(("groups", "kept"), [(1, 1), (4, 2), (2, 1)])
def test_deepseek_v3(groups: int, kept: int, renormalise: bool) -> None:
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    settings = {"n_group": groups, "topk_group": kept, "norm_topk_prob": renormalise, "routed_scaling_factor": 2.5}
    module = DeepseekV3TopkRouter(config(16, 4, **settings))
    module.e_score_correction_bias.copy_(bias_E := 0.5 * normal(16, seed=6) - 1)
    spec = RouterSpec(
        16, 4, "sigmoid", renormalise, groups=groups, kept_groups=kept, group_score="top2", scale=2.5,
        selection_bias=True,
    )  # fmt: skip
    assert_same(spec, theirs(module, LOGITS), LOGITS, bias_E)


@pytest.mark.parametrize("method", ["greedy", "group_limited_greedy"])
def test_deepseek_v2(method: str) -> None:
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter

    module = DeepseekV2TopkRouter(
        config(16, 4, n_group=4, topk_group=2, topk_method=method, routed_scaling_factor=16.0)
    )
    groups, kept = (1, 1) if method == "greedy" else (4, 2)
    spec = RouterSpec(16, 4, "softmax", renormalise=False, groups=groups, kept_groups=kept, scale=16.0)
    assert_same(spec, theirs(module, LOGITS), LOGITS)


def test_mixtral() -> None:
    from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter

    assert_same(RouterSpec(16, 2), theirs(MixtralTopKRouter(config(16, 2)), LOGITS), LOGITS)


@pytest.mark.parametrize("renormalise", [True, False])
def test_olmoe(renormalise: bool) -> None:
    from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter

    module = OlmoeTopKRouter(config(16, 8, norm_topk_prob=renormalise))
    assert_same(RouterSpec(16, 8, renormalise=renormalise), theirs(module, LOGITS), LOGITS)


def test_gpt_oss() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter

    assert_same(RouterSpec(16, 4, "softmax_top"), theirs(GptOssTopKRouter(config(16, 4)), LOGITS), LOGITS)


def test_granite() -> None:
    from transformers.models.granitemoe.modeling_granitemoe import GraniteMoeTopKRouter

    assert_same(RouterSpec(16, 8, "softmax_top"), theirs(GraniteMoeTopKRouter(config(16, 8)), LOGITS), LOGITS)


@pytest.mark.parametrize("jitter", [0.01, 0.2])
def test_phimoe(jitter: float) -> None:
    from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

    module = PhimoeTopKRouter(config(16, 2, router_jitter_noise=jitter, input_jitter_noise=0.0))
    assert_same(RouterSpec(16, 2, "sparsemixer", jitter=jitter), theirs(module, LOGITS), LOGITS)


def test_minimax_m2() -> None:
    from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter

    bias_E = 0.3 * normal(16, seed=6)
    wanted = theirs(MiniMaxM2TopKRouter(config(16, 4)), LOGITS, bias_E)
    assert_same(RouterSpec(16, 4, "sigmoid", selection_bias=True), wanted, LOGITS, bias_E)
