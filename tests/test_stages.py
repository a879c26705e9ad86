from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from expertmesh.dispatch import ApplyExperts, Gate, Gated, Scores, plan_dispatch
from expertmesh.model import invariant
from expertmesh.model.attention import gating_stage
from expertmesh.model.embedding import BIGRAM_MULTIPLIER, FIRST_TOKEN_PREDECESSOR, EmbeddingStage
from expertmesh.model.full import FullModel
from expertmesh.model.head import ClassifierStage
from expertmesh.model.layers import GatedMLP
from expertmesh.model.sequences import Sequences
from expertmesh.model.spec import AttentionSpec, EmbeddingSpec, ExpertSpec, HeadSpec, ModelSpec, RouterSpec

VOCAB, CONTEXT = 300, 128

SMALL = ModelSpec(
    width=48,
    layers=2,
    context=CONTEXT,
    embedding=EmbeddingSpec(VOCAB, bigram_buckets=97, bigram_width=8),
    attention=AttentionSpec(heads=4),
    router=RouterSpec(experts=8, top_k=2),
    expert=ExpertSpec(width=36),  # no multiple of a vector, so that plain SiLU is noticed
    head=HeadSpec(labels=("world", "sports", "business", "science")),
)
SWITCHES = {
    **{f"top-{k}": replace(SMALL, router=RouterSpec(experts=5, top_k=k)) for k in range(1, 6)},
    **{pool: replace(SMALL, head=replace(SMALL.head, pool=pool)) for pool in ("mean", "max", "mean_max")},
    "raw weights": replace(SMALL, router=RouterSpec(experts=8, top_k=3, renormalise=False)),
    "no bigrams": replace(SMALL, embedding=EmbeddingSpec(VOCAB)),
    "one expert": replace(SMALL, router=RouterSpec(experts=1, top_k=1)),
    "one head": replace(SMALL, attention=AttentionSpec(heads=1)),
    "heads of width 1": replace(SMALL, attention=AttentionSpec(heads=48)),
    "two classes": replace(SMALL, head=replace(SMALL.head, labels=("no", "yes"))),
    "one layer": replace(SMALL, layers=1),
    "as trained": replace(SMALL, width=192, attention=AttentionSpec(heads=6), expert=ExpertSpec(width=256)),
}

lengths_lists = st.lists(st.integers(1, CONTEXT), min_size=1, max_size=12)


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def few(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, database=None)


def seeded(build: Callable[[], Any], seed: int = 0) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().eval().requires_grad_(False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def texts(lengths: list[int], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCAB, (length,), generator=generator) for length in lengths]


def run(model: FullModel, batch: list[Tensor], threads: int = 1, observe: Any = None) -> Scores:
    torch.set_num_threads(threads)
    lengths_B = torch.tensor([len(ids_T) for ids_T in batch])
    return model(torch.cat(batch).to(model.device), lengths_B.to(model.device), observe)


def differing_rows(got: Tensor, wanted: Tensor) -> int:
    assert got.shape == wanted.shape
    unequal = got.contiguous().view(torch.int32) != wanted.contiguous().view(torch.int32)
    return int(unequal.flatten(1).any(dim=1).sum())


def changed_by_company(
    model: FullModel, sequences: list[Tensor], batches: list[list[int]] | None = None, threads: int = 1
) -> int:
    """Sequences whose scores come out otherwise in these batches (or all together) than alone on one thread."""

    def scores_BC(batch: list[Tensor], on: int) -> Tensor:
        scores = run(model, batch, on)
        return torch.cat([scores.logits_BC, scores.probabilities_BC], dim=1)

    alone_BC = torch.cat([scores_BC([ids_T], 1) for ids_T in sequences])
    return sum(
        differing_rows(scores_BC([sequences[place] for place in batch], threads), alone_BC[batch])
        for batch in batches or [list(range(len(sequences)))]
    )


@pytest.fixture(scope="module")
def model() -> FullModel:
    return seeded(lambda: FullModel(SMALL))


# The promise: a sequence does not notice its company.


@few(30)
@given(lengths_lists, st.integers(0, 99), st.randoms(use_true_random=False))
def test_a_sequence_alone_equals_itself_in_any_split_and_order(
    model: FullModel, lengths: list[int], seed: int, random: Any
) -> None:
    order = random.sample(range(len(lengths)), k=len(lengths))
    cuts = sorted(random.sample(range(1, len(lengths)), k=random.randint(0, len(lengths) - 1)))
    split = [order[start:end] for start, end in zip([0, *cuts], [*cuts, len(order)], strict=True)]
    assert changed_by_company(model, texts(lengths, seed), [order, *split]) == 0


@pytest.mark.parametrize("threads", [1, 2])
def test_a_sequence_of_every_length_equals_itself_among_all_the_others(model: FullModel, threads: int) -> None:
    assert changed_by_company(model, texts(list(range(1, CONTEXT + 1))), threads=threads) == 0


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("lengths", [[1], [3, 2], [17, 5, 40, 128, 1]], ids=str)
def test_a_trained_models_sizes_keep_the_promise_on_one_and_two_threads(lengths: list[int], threads: int) -> None:
    assert changed_by_company(seeded(lambda: FullModel(SWITCHES["as trained"])), texts(lengths), threads=threads) == 0


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_promise_holds_for_every_switch_of_a_spec(switch: str) -> None:
    sequences = texts([5, 1, 128, 16, 17, 3, 64, 2, 40])
    batches = [[0, 1, 2, 3, 4, 5, 6, 7, 8], [8, 6, 4, 2, 0], [1, 7], [5]]
    assert changed_by_company(seeded(lambda: FullModel(SWITCHES[switch])), sequences, batches) == 0


def test_the_promise_holds_for_widths_that_are_no_multiple_of_four() -> None:
    model = seeded(lambda: FullModel(replace(SMALL, width=50, attention=AttentionSpec(heads=2))))
    assert changed_by_company(model, texts([5, 1, 128, 16, 17, 3, 64, 2, 40])) == 0


# The suite notices: the same function finds what operations change that break the promise.


def test_the_suite_notices_one_bit_of_one_sequence(model: FullModel, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = ClassifierStage.forward

    def bent(stage: ClassifierStage, x_TD: Tensor, sequences: Sequences) -> Scores:
        scores = forward(stage, x_TD, sequences)
        if len(scores.logits_BC) > 1:
            scores.logits_BC[-1, 2] = torch.nextafter(scores.logits_BC[-1, 2], torch.tensor(torch.inf))
        return scores

    monkeypatch.setattr(ClassifierStage, "forward", bent)
    assert changed_by_company(model, texts([9, 4, 12]), [[0, 1, 2], [1, 2], [2], [0]]) == 2


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="not known which operations are guilty"
)
@pytest.mark.parametrize("mutation", ["linear", "one padded length"])
def test_the_suite_notices_plain_operations(model: FullModel, mutation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if mutation == "one padded length":

        def one_group(self: Sequences) -> list[Any]:
            return [self._group(torch.arange(len(self.lengths_B)), int(self.lengths_B.max()))]

        monkeypatch.setattr(Sequences, "groups", property(one_group))
    else:
        monkeypatch.setattr(invariant, mutation, getattr(functional, mutation))
    sequences = texts([1, 2, 3, 5, 7, 11, 17, 40, 100, 128])
    assert changed_by_company(model, sequences, [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9], list(range(10))]) > 0


# The whole model against a plain one in float64: padding, groups, permutations and slices are nowhere in it.


def plain_logits(model: FullModel, ids_T: Tensor) -> Tensor:
    """One sequence, as the papers write it."""
    spec, weights = model.spec, {name: value.double() for name, value in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return functional.layer_norm(
            x, (spec.width,), weights[f"{name}.weight"], weights[f"{name}.bias"], spec.norm.eps
        )

    def linear(x: Tensor, name: str) -> Tensor:
        return functional.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    x_TD = weights["embedding.token.weight"][ids_T] + weights["embedding.position.weight"][: len(ids_T)]
    if spec.embedding.bigram_buckets:
        ids = ids_T.tolist()
        pairs = zip([FIRST_TOKEN_PREDECESSOR, *ids], ids, strict=False)
        buckets = [(before * BIGRAM_MULTIPLIER + token) % spec.embedding.bigram_buckets for before, token in pairs]
        x_TD = x_TD + linear(weights["embedding.bigram.weight"][buckets], "embedding.bigram_out")
    for layer in range(spec.layers):
        qkv = linear(norm(x_TD, f"gating.{layer}.attention_norm"), f"gating.{layer}.qkv")
        q, k, v = qkv.view(len(ids_T), 3, spec.attention.heads, -1).permute(1, 2, 0, 3)
        attended = functional.scaled_dot_product_attention(q, k, v).transpose(0, 1).reshape(x_TD.shape)
        x_TD = x_TD + linear(attended, f"gating.{layer}.out")
        h_TD = norm(x_TD, f"gating.{layer}.expert_norm")
        probabilities_TE = torch.softmax(linear(h_TD, f"gating.{layer}.router"), dim=-1)
        routed = []
        for h_D, probabilities_E in zip(h_TD, probabilities_TE, strict=True):
            chosen = probabilities_E.argsort(descending=True)[: spec.router.top_k].tolist()
            total = sum(probabilities_E[chosen]) if spec.router.renormalise else 1.0
            mixed = torch.zeros_like(h_D)
            for expert in chosen:
                name = f"experts.{layer}.{expert}"
                inner = functional.silu(linear(h_D, f"{name}.gate")) * linear(h_D, f"{name}.up")
                mixed = mixed + probabilities_E[expert] / total * linear(inner, f"{name}.down")
            routed.append(mixed)
        x_TD = x_TD + torch.stack(routed)
    x_TD = norm(x_TD, "classifier.norm")
    pools = {"mean": [x_TD.mean(dim=0)], "max": [x_TD.amax(dim=0)]}
    return linear(torch.cat(pools.get(spec.head.pool) or pools["mean"] + pools["max"]), "classifier.out")


@pytest.mark.parametrize("switch", SWITCHES)
def test_the_model_is_the_plain_one_for_every_switch_of_a_spec(switch: str) -> None:
    model = seeded(lambda: FullModel(SWITCHES[switch]), seed=1)
    batch = texts([1, 2, 15, 16, 17, 33], seed=1)
    scores = run(model, batch)
    wanted = torch.stack([plain_logits(model, ids_T) for ids_T in batch])
    torch.testing.assert_close(scores.logits_BC.double(), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(scores.probabilities_BC.double(), wanted.softmax(dim=-1), atol=1e-5, rtol=1e-5)


# Embedding


def embedded(stage: EmbeddingStage, batch: list[Tensor]) -> Tensor:
    return stage(torch.cat(batch), Sequences(torch.tensor([len(ids_T) for ids_T in batch])))


@few(40)
@given(lengths_lists, st.integers(0, 99))
def test_bigrams_and_positions_never_cross_the_border_of_a_sequence(lengths: list[int], seed: int) -> None:
    stage = seeded(lambda: EmbeddingStage(SMALL))
    batch = texts(lengths, seed)
    alone = torch.cat([embedded(stage, [ids_T]) for ids_T in batch])
    assert differing_rows(embedded(stage, batch), alone) == 0


def test_a_token_changes_its_own_row_and_the_bigram_behind_it() -> None:
    stage = seeded(lambda: EmbeddingStage(SMALL))
    batch = texts([6, 6, 6])
    before = embedded(stage, batch)
    for place, rows in ((0, [6, 7]), (3, [9, 10]), (5, [11])):
        other = [ids_T.clone() for ids_T in batch]
        other[1][place] = (other[1][place] + 1) % VOCAB
        assert (embedded(stage, other) != before).any(dim=1).nonzero()[:, 0].tolist() == rows


def test_without_bigrams_a_row_is_its_token_and_its_position() -> None:
    stage = seeded(lambda: EmbeddingStage(SWITCHES["no bigrams"]))
    assert sorted(name for name, _ in stage.named_parameters()) == ["position.weight", "token.weight"]
    wanted = stage.token.weight[[7, 8, 7]] + stage.position.weight[[0, 1, 0]]
    assert differing_rows(embedded(stage, [torch.tensor([7, 8]), torch.tensor([7])]), wanted) == 0


# Gating


@few(30)
@given(lengths_lists, st.integers(1, 8), st.booleans(), st.integers(0, 99))
def test_routes_ascend_are_distinct_and_weigh_one(lengths: list[int], top_k: int, renormalise: bool, seed: int) -> None:
    spec = replace(SMALL, router=RouterSpec(experts=8, top_k=top_k, renormalise=renormalise))
    stage = seeded(lambda: gating_stage(spec, 0))
    gated: Gated = stage(normal(sum(lengths), spec.width, seed=seed), Sequences(torch.tensor(lengths)))
    ids_TK, weights_TK = gated.expert_ids_TK, gated.weights_TK
    assert ids_TK.shape == weights_TK.shape == (sum(lengths), top_k)
    assert (ids_TK.dtype, weights_TK.dtype) == (torch.int64, torch.float32)
    assert (ids_TK[:, 1:] > ids_TK[:, :-1]).all()
    assert ids_TK.min() >= 0
    assert ids_TK.max() < 8
    assert (weights_TK > 0).all()
    if renormalise or top_k == 8:
        torch.testing.assert_close(weights_TK.double().sum(dim=1), torch.ones(sum(lengths)).double(), atol=5e-7, rtol=0)
    else:
        assert (weights_TK.sum(dim=1) < 1).all()


def test_the_best_experts_are_chosen_with_the_weights_of_their_scores() -> None:
    stage = seeded(lambda: gating_stage(SMALL, 0))
    logits_TE = torch.tensor([[0.0, 3, 1, -2, 2, 0, 0, 0], [5.0, 0, 0, 0, 0, 0, 0, 4]])
    ids_TK, weights_TK = stage.route(logits_TE)
    assert ids_TK.tolist() == [[1, 4], [0, 7]]
    torch.testing.assert_close(weights_TK, torch.softmax(torch.tensor([[3.0, 2], [5, 4]]), dim=1))


@few(30)
@given(lengths_lists, st.integers(0, 99))
def test_gating_gives_every_token_the_same_bits_and_routes_in_any_batch(lengths: list[int], seed: int) -> None:
    stage = seeded(lambda: gating_stage(SMALL, 0))
    x_TD = normal(sum(lengths), SMALL.width, seed=seed)
    alone = [stage(rows_TD, Sequences(torch.tensor([len(rows_TD)]))) for rows_TD in x_TD.split(lengths)]
    together = stage(x_TD, Sequences(torch.tensor(lengths)))
    for name in ("residual_TD", "expert_input_TD", "weights_TK"):
        assert differing_rows(getattr(together, name), torch.cat([getattr(gated, name) for gated in alone])) == 0
    assert torch.equal(together.expert_ids_TK, torch.cat([gated.expert_ids_TK for gated in alone]))


# Experts


@few(30)
@given(
    st.integers(1, 200),
    st.integers(0, 2**32 - 1),
    st.sampled_from([1, 1, 1, 2]),
    st.sampled_from(["top-1", "as trained"]),
)
def test_an_expert_is_a_pure_function_of_each_row(count: int, seed: int, threads: int, switch: str) -> None:
    spec = SWITCHES[switch]
    expert = seeded(lambda: GatedMLP(spec.width, spec.expert))
    rows_ND = normal(200, spec.width)
    torch.set_num_threads(1)
    wanted = expert(rows_ND)
    chosen = torch.randperm(200, generator=torch.Generator().manual_seed(seed))[:count]
    torch.set_num_threads(threads)
    assert differing_rows(expert(rows_ND[chosen]), wanted[chosen]) == 0


@pytest.mark.parametrize("switch", SWITCHES)
def test_padding_is_never_routed(switch: str) -> None:
    spec = SWITCHES[switch]
    batch = texts([1, 17, 33, 128, 100])
    tokens = sum(len(ids_T) for ids_T in batch)
    gates: list[Gated] = []
    dispatched: list[ApplyExperts] = []

    def observe(call: Any, result: Any) -> None:
        if isinstance(call, Gate):
            gates.append(result)
        if isinstance(call, ApplyExperts):
            dispatched.append(call)
            assert result.rows_ND.shape == call.rows_ND.shape

    run(seeded(lambda: FullModel(spec)), batch, observe=observe)
    assert len(gates) == len(dispatched) == spec.layers
    for gated, call in zip(gates, dispatched, strict=True):
        assert call.rows_ND.shape == (tokens * spec.router.top_k, spec.width)
        assert call.counts_E.shape == (spec.router.experts,)
        assert call.counts_E.sum() == tokens * spec.router.top_k
        plan = plan_dispatch(gated.expert_ids_TK, spec.router.experts)
        assert differing_rows(call.rows_ND, gated.expert_input_TD[plan.row2token]) == 0


# Classifier


@pytest.mark.parametrize("pool", ["mean", "max", "mean_max"])
def test_pooling_sees_the_tokens_of_a_sequence_and_nothing_else(pool: str) -> None:
    stage = seeded(lambda: ClassifierStage(SWITCHES[pool]))
    lengths = [1, 2, 15, 16, 17, 31, 33, 128]
    x_TD = 3 * normal(sum(lengths), SMALL.width) - 1
    got = stage(x_TD, Sequences(torch.tensor(lengths)))
    for place, rows_TD in enumerate(stage.norm(x_TD).double().split(lengths)):
        pools = {"mean": rows_TD.mean(dim=0), "max": rows_TD.amax(dim=0)}
        pooled = torch.cat([value for name, value in pools.items() if name in pool])
        wanted = stage.out.weight.double() @ pooled + stage.out.bias.double()
        torch.testing.assert_close(got.logits_BC[place].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["mean", "max", "mean_max"])
def test_a_sequence_is_not_touched_by_what_its_mates_hold(pool: str) -> None:
    stage = seeded(lambda: ClassifierStage(SWITCHES[pool]))
    x_TD, sequences = normal(60, SMALL.width), Sequences(torch.tensor([20, 20, 20]))
    wanted = stage(x_TD, sequences).logits_BC
    x_TD[:20], x_TD[40:] = float("nan"), float("inf")
    assert differing_rows(stage(x_TD, sequences).logits_BC[1:2], wanted[1:2]) == 0


def test_probabilities_are_the_softmax_of_the_logits(model: FullModel) -> None:
    scores = run(model, texts([3, 20]))
    assert scores.logits_BC.shape == scores.probabilities_BC.shape == (2, 4)
    assert torch.equal(scores.probabilities_BC, torch.softmax(scores.logits_BC, dim=-1))
