from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import expertmesh
from expertmesh.dispatch import (
    Applied,
    ApplyExperts,
    Embed,
    Gate,
    Gated,
    Score,
    Scores,
    StageCall,
    classify,
    combine,
    drive,
    drive_async,
    layer_loop,
    leave_out,
    plan_dispatch,
)

WIDTH = 5

hypotheses = settings(deadline=None, database=None)


@st.composite
def routings(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """Expert ids [T, K], ascending and distinct along K, and the number of experts."""
    experts = draw(st.integers(1, 12))
    top_k = draw(st.integers(1, experts))
    choice = st.lists(st.integers(0, experts - 1), min_size=top_k, max_size=top_k, unique=True).map(sorted)
    rows = draw(st.lists(choice, max_size=30))
    return np.array(rows, dtype=np.int64).reshape(len(rows), top_k), experts


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def equal_bits(one: Any, other: Any) -> bool:
    one, other = np.asarray(one), np.asarray(other)
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


def product(x_ND: np.ndarray, matrix_DO: np.ndarray) -> np.ndarray:
    """Column after column, so that a row's bits depend on neither its mates nor a BLAS."""
    return sum(x_ND[:, column : column + 1] * row_O for column, row_O in enumerate(matrix_DO))


class ScriptedStages:
    """Answers every stage call in numpy: experts are fixed matrices, routes are by content."""

    def __init__(self, experts: int = 4, top_k: int = 2) -> None:
        self.experts, self.top_k = experts, top_k
        self.asked: list[StageCall] = []
        self.scores = Scores(normal(8, 2, 3), normal(9, 2, 3))

    def __call__(self, call: StageCall) -> Any:
        self.asked.append(call)
        match call:
            case Embed(ids_T=ids_T):
                return normal(1, 50, WIDTH)[ids_T]
            case Gate(layer=layer, x_TD=x_TD):
                scores_TE = product(x_TD, normal(20 + layer, WIDTH, self.experts))
                ids_TK = np.sort(np.argsort(-scores_TE, axis=1)[:, : self.top_k], axis=1)
                return Gated(x_TD + 1, x_TD * 2, ids_TK, np.take_along_axis(scores_TE, ids_TK, axis=1))
            case ApplyExperts(layer=layer, rows_ND=rows_ND):
                return Applied(
                    np.concatenate([self.expert(layer, expert, rows_ND[rows]) for expert, rows in call.slices()])
                )
            case Score():
                return self.scores

    def expert(self, layer: int, expert: int, rows_ND: np.ndarray) -> np.ndarray:
        return product(rows_ND, normal(100 + 10 * layer + expert, WIDTH, WIDTH))


IDS_T, LENGTHS_B = np.array([3, 1, 4, 1, 5, 9, 2]), np.array([4, 3])


def shape_of(layers: int = 3, experts: int = 4, residual_multiplier: float = 1.0) -> Any:
    return SimpleNamespace(
        layers=layers, router=SimpleNamespace(experts=experts), residual_multiplier=residual_multiplier
    )


def loop(layers: int = 3) -> Any:
    return classify(shape_of(layers), IDS_T, LENGTHS_B)


# plan_dispatch


@hypotheses
@given(routings())
def test_dispatch_is_a_bijection_of_choices_and_rows(routing: tuple[np.ndarray, int]) -> None:
    ids_TK, experts = routing
    plan = plan_dispatch(ids_TK, experts)
    assert plan.choice2row_TK.shape == ids_TK.shape
    assert sorted(plan.choice2row_TK.reshape(-1)) == list(range(ids_TK.size))
    tokens_TK = np.broadcast_to(np.arange(len(ids_TK))[:, None], ids_TK.shape)
    assert np.array_equal(plan.row2token[plan.choice2row_TK], tokens_TK)


@hypotheses
@given(routings())
def test_rows_are_counted_and_sorted_by_expert_and_keep_their_order_within_one(
    routing: tuple[np.ndarray, int],
) -> None:
    ids_TK, experts = routing
    plan = plan_dispatch(ids_TK, experts)
    assert plan.counts_E.tolist() == [int((ids_TK == expert).sum()) for expert in range(experts)]
    row2expert = np.repeat(np.arange(experts), plan.counts_E)
    assert np.array_equal(row2expert[plan.choice2row_TK], ids_TK)
    assert plan.row2token.tolist() == [
        token for expert in range(experts) for token, ids_K in enumerate(ids_TK) if expert in ids_K
    ]


@hypotheses
@given(routings(), st.sampled_from([np.int64, np.int32, np.uint8]))
def test_a_plan_does_not_depend_on_who_holds_the_ids(routing: tuple[np.ndarray, int], dtype: Any) -> None:
    ids_TK, experts = routing
    wanted = plan_dispatch(ids_TK, experts)
    for held in (ids_TK.astype(dtype), torch.from_numpy(ids_TK.astype(dtype)), np.asfortranarray(ids_TK)):
        plan = plan_dispatch(held, experts)
        assert equal_bits(plan.counts_E, wanted.counts_E)
        assert equal_bits(plan.row2token, wanted.row2token)
        assert equal_bits(plan.choice2row_TK, wanted.choice2row_TK)


def test_a_plan_of_no_tokens_has_no_rows() -> None:
    plan = plan_dispatch(np.empty((0, 2), dtype=np.int64), 4)
    assert (plan.counts_E.tolist(), plan.row2token.size, plan.choice2row_TK.shape) == ([0] * 4, 0, (0, 2))


# slices


@hypotheses
@given(st.lists(st.integers(0, 5), min_size=1, max_size=20))
def test_slices_cover_every_row_once_and_name_only_experts_with_rows(counts: list[int]) -> None:
    call = ApplyExperts(0, np.arange(sum(counts)), np.array(counts))
    slices = call.slices()
    assert [expert for expert, _ in slices] == [expert for expert, count in enumerate(counts) if count]
    assert all(rows.stop - rows.start == counts[expert] for expert, rows in slices)
    assert [row for _, rows in slices for row in call.rows_ND[rows]] == list(range(sum(counts)))


@hypotheses
@given(routings())
def test_a_slice_holds_the_tokens_of_its_expert(routing: tuple[np.ndarray, int]) -> None:
    ids_TK, experts = routing
    plan = plan_dispatch(ids_TK, experts)
    for expert, rows in ApplyExperts(0, plan.row2token, plan.counts_E).slices():
        assert plan.row2token[rows].tolist() == np.flatnonzero((ids_TK == expert).any(axis=1)).tolist()


# combine


def combined_one_by_one(residual_TD: np.ndarray, rows_ND: np.ndarray, weights_TK: np.ndarray, plan: Any) -> np.ndarray:
    """The combine as a person would do it: token by token, in ascending expert order, each step rounded to fp32."""
    result = np.empty_like(residual_TD)
    for token, rows_K in enumerate(plan.choice2row_TK):
        for column in range(residual_TD.shape[1]):
            routed = weights_TK[token, 0] * rows_ND[rows_K[0], column]
            for choice in range(1, len(rows_K)):
                routed = np.float32(routed + np.float32(weights_TK[token, choice] * rows_ND[rows_K[choice], column]))
            result[token, column] = np.float32(residual_TD[token, column] + routed)
    return result


def combine_inputs(routing: tuple[np.ndarray, int], seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, Any]:
    ids_TK, experts = routing
    magnitudes = np.float32(10) ** normal(seed + 3, ids_TK.size, 1)
    rows_ND = normal(seed + 1, ids_TK.size, WIDTH) * magnitudes
    plan = plan_dispatch(ids_TK, experts)
    return normal(seed, len(ids_TK), WIDTH), rows_ND, np.abs(normal(seed + 2, *ids_TK.shape)), plan


@hypotheses
@given(routings(), st.integers(0, 2**31))
def test_combine_adds_in_ascending_expert_order_in_fp32(routing: tuple[np.ndarray, int], seed: int) -> None:
    inputs = combine_inputs(routing, seed)
    assert equal_bits(combine(*inputs), combined_one_by_one(*inputs))


@hypotheses
@given(routings(), st.integers(0, 2**31))
def test_combine_gives_the_same_bits_in_numpy_and_in_torch(routing: tuple[np.ndarray, int], seed: int) -> None:
    residual_TD, rows_ND, weights_TK, plan = combine_inputs(routing, seed)
    in_torch = combine(*(torch.from_numpy(each) for each in (residual_TD, rows_ND, weights_TK)), plan)
    assert isinstance(in_torch, torch.Tensor)
    assert equal_bits(in_torch, combine(residual_TD, rows_ND, weights_TK, plan))


@pytest.mark.parametrize("width", [1, 3, 48, 192])
def test_combine_gives_a_token_the_same_bits_alone_and_in_company(width: int) -> None:
    ids_TK = np.sort(np.argsort(normal(0, 70, 8), axis=1)[:, :3], axis=1)
    residual_TD, rows_TKD, weights_TK = normal(1, 70, width), normal(2, 70, 3, width), normal(3, 70, 3)

    def combined(tokens: np.ndarray, of: Callable[[np.ndarray], Any]) -> np.ndarray:
        plan = plan_dispatch(ids_TK[tokens], 8)
        rows_ND = np.empty((len(tokens) * 3, width), dtype=np.float32)
        rows_ND[plan.choice2row_TK] = rows_TKD[tokens]
        return np.asarray(combine(of(residual_TD[tokens]), of(rows_ND), of(weights_TK[tokens]), plan))

    together = combined(np.arange(70), np.asarray)
    for of in (np.asarray, torch.from_numpy):
        for count in range(1, 71):
            tokens = np.random.default_rng(count).permutation(70)[:count]
            assert equal_bits(combined(tokens, of), together[tokens])


def test_combine_would_differ_in_another_order() -> None:
    plan = plan_dispatch(np.array([[0, 1, 2]]), 3)
    rows_ND = np.array([[1e8], [1.0], [-1e8]], dtype=np.float32)
    weights_TK, residual_TD = np.ones((1, 3), dtype=np.float32), np.zeros((1, 1), dtype=np.float32)
    assert combine(residual_TD, rows_ND, weights_TK, plan).item() == 0.0
    assert combine(residual_TD, rows_ND[[0, 2, 1]], weights_TK, plan).item() == 1.0


# leave_out


@st.composite
def absences(draw: st.DrawFn) -> tuple[tuple[np.ndarray, int], list[int], int, float]:
    """A routing, the experts that are missing, a seed and a residual multiplier."""
    routing = draw(routings())
    missing = draw(st.lists(st.integers(0, routing[1] - 1), min_size=1, unique=True).map(sorted))
    return routing, missing, draw(st.integers(0, 2**31)), draw(st.sampled_from([1.0, 0.22, 3.0]))


@hypotheses
@given(absences())
def test_without_experts_the_others_make_up_for_them_and_nobody_else_changes(absence: Any) -> None:
    (ids_TK, experts), missing, seed, multiplier = absence
    residual_TD, rows_ND, weights_TK, plan = combine_inputs((ids_TK, experts), seed)
    whole_TD = combine(residual_TD, rows_ND, weights_TK, plan, multiplier)
    is_missing_TK = np.isin(ids_TK, missing)
    spoilt_ND = rows_ND.copy()
    spoilt_ND[plan.choice2row_TK[is_missing_TK]] = np.nan
    kept_ND, mended_TK = leave_out(missing, spoilt_ND, ids_TK, weights_TK, plan)
    x_TD = combine(residual_TD, kept_ND, mended_TK, plan, multiplier)
    assert equal_bits(spoilt_ND[~np.isnan(spoilt_ND)], kept_ND[~np.isnan(spoilt_ND)])  # nothing was changed in place
    for token, gone_K in enumerate(is_missing_TK):
        if not gone_K.any():
            assert equal_bits(mended_TK[token], weights_TK[token])
            assert equal_bits(x_TD[token], whole_TD[token])
        elif gone_K.all():
            assert equal_bits(x_TD[token], residual_TD[token])
        else:
            assert mended_TK[token].sum() == pytest.approx(weights_TK[token].sum(), rel=1e-5)
            assert not mended_TK[token][gone_K].any()
            ratios = mended_TK[token][~gone_K] / weights_TK[token][~gone_K]
            assert ratios == pytest.approx(ratios[0], rel=1e-5)
            alone = plan_dispatch(ids_TK[token : token + 1, ~gone_K], experts)  # as if it had chosen no others
            rows_KD = kept_ND[plan.choice2row_TK[token, ~gone_K]]
            expected = combine(
                residual_TD[token : token + 1], rows_KD, mended_TK[None, token, ~gone_K], alone, multiplier
            )
            assert equal_bits(x_TD[token], expected[0])


@hypotheses
@given(absences())
def test_without_experts_a_token_has_the_same_bits_alone_and_in_company(absence: Any) -> None:
    (ids_TK, experts), missing, seed, multiplier = absence
    residual_TD, rows_ND, weights_TK, plan = combine_inputs((ids_TK, experts), seed)
    x_TD = combine(residual_TD, *leave_out(missing, rows_ND, ids_TK, weights_TK, plan), plan, multiplier)
    for token in range(len(ids_TK)):
        one = slice(token, token + 1)
        alone = plan_dispatch(ids_TK[one], experts)
        left = leave_out(missing, rows_ND[plan.choice2row_TK[token]], ids_TK[one], weights_TK[one], alone)
        assert equal_bits(combine(residual_TD[one], *left, alone, multiplier)[0], x_TD[token])


def test_weights_that_are_next_to_nothing_are_mended_too() -> None:
    plan = plan_dispatch(np.array([[0, 1], [0, 2]]), 3)
    weights_TK = np.array([[1.0, 1e-38], [1.0, 0.0]], np.float32)
    kept_ND, mended_TK = leave_out([0], np.ones((4, 1), np.float32), np.array([[0, 1], [0, 2]]), weights_TK, plan)
    assert mended_TK.tolist() == [[0.0, 1.0], [0.0, 0.0]]
    assert combine(np.zeros((2, 1), np.float32), kept_ND, mended_TK, plan).tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("shared_is_due", [False, True])
def test_the_loop_leaves_out_what_is_missing_and_keeps_the_shared_experts(shared_is_due: bool) -> None:
    class Lacking(ScriptedStages):
        def __call__(self, call: StageCall) -> Any:
            result = super().__call__(call)
            if isinstance(call, ApplyExperts):
                rows_ND = result.rows_ND.copy()
                rows_ND[: call.counts_E[0]] = np.nan
                return Applied(rows_ND, normal(77, 1, WIDTH) if shared_is_due else None, [0])
            if isinstance(call, Gate):
                return replace(result, shared_is_due=shared_is_due)
            return result

    stages, whole = Lacking(), ScriptedStages()
    x_TD = drive(layer_loop(shape_of(1), IDS_T, LENGTHS_B), stages)
    gated = ScriptedStages()(stages.asked[1])
    plan = plan_dispatch(gated.expert_ids_TK, 4)
    applied = whole(stages.asked[2])
    residual_TD = gated.residual_TD + (normal(77, 1, WIDTH) if shared_is_due else np.float32(-0.0))
    left = leave_out([0], applied.rows_ND, gated.expert_ids_TK, gated.weights_TK, plan)
    assert np.isfinite(x_TD).all()
    assert equal_bits(x_TD, combine(residual_TD, *left, plan))


# layer_loop


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_stages_are_asked_in_the_one_order(layers: int) -> None:
    stages = ScriptedStages()
    drive(loop(layers), stages)
    per_layer = [(kind, layer) for layer in range(layers) for kind in (Gate, ApplyExperts)]
    assert [(type(call), getattr(call, "layer", None)) for call in stages.asked] == [
        (Embed, None),
        *per_layer,
        (Score, None),
    ]


def test_every_stage_is_asked_about_what_the_stage_before_it_gave() -> None:
    stages = ScriptedStages()
    answers: list[Any] = []

    def answer(call: StageCall) -> Any:
        answers.append(stages(call))
        return answers[-1]

    assert drive(loop(2), answer) is stages.scores
    embed, gate_0, experts_0, gate_1, experts_1, score = stages.asked
    embedded, gated_0, applied_0, gated_1, applied_1, _ = answers
    assert embed.ids_T is IDS_T
    assert all(call.lengths_B is LENGTHS_B for call in (embed, gate_0, gate_1, score))
    assert gate_0.x_TD is embedded
    first, second = (experts_0, gated_0, applied_0, gate_1), (experts_1, gated_1, applied_1, score)
    for experts, gated, applied, after in (first, second):
        plan = plan_dispatch(gated.expert_ids_TK, 4)
        assert equal_bits(experts.rows_ND, gated.expert_input_TD[plan.row2token])
        assert equal_bits(experts.counts_E, plan.counts_E)
        assert equal_bits(after.x_TD, combine(gated.residual_TD, applied.rows_ND, gated.weights_TK, plan))


@hypotheses
@given(st.integers(1, 6), st.data())
def test_the_loop_is_the_plain_model_token_by_token(experts: int, data: st.DataObject) -> None:
    stages = ScriptedStages(experts, top_k=data.draw(st.integers(1, experts)))
    drive(classify(shape_of(2, experts), IDS_T, LENGTHS_B), stages)
    x_TD = stages.asked[1].x_TD
    for layer, gate in enumerate(call for call in list(stages.asked) if isinstance(call, Gate)):
        assert equal_bits(gate.x_TD, x_TD)
        gated = stages(gate)
        rows = []
        for token, ids_K in enumerate(gated.expert_ids_TK):
            parts = [stages.expert(layer, expert, gated.expert_input_TD[token : token + 1])[0] for expert in ids_K]
            routed = gated.weights_TK[token, 0] * parts[0]
            for weight, part in zip(gated.weights_TK[token, 1:], parts[1:], strict=True):
                routed = routed + weight * part
            rows.append(gated.residual_TD[token] + routed)
        x_TD = np.stack(rows)
    (score,) = [call for call in stages.asked if isinstance(call, Score)]
    assert equal_bits(score.x_TD, x_TD)


def test_the_loop_alone_gives_the_last_residual_and_scores_nothing() -> None:
    stages, scored = ScriptedStages(), ScriptedStages()
    x_TD = drive(layer_loop(shape_of(2), IDS_T, LENGTHS_B), stages)
    drive(loop(2), scored)
    assert equal_bits(x_TD, scored.asked[-1].x_TD)
    assert [type(call) for call in stages.asked] == [type(call) for call in scored.asked[:-1]]


@pytest.mark.parametrize("dense", [{0}, {1}, {2}, {0, 2}, {0, 1, 2}])
def test_a_dense_layer_gives_the_residual_and_asks_no_experts(dense: set[int]) -> None:
    class Dense(ScriptedStages):
        def __call__(self, call: StageCall) -> Any:
            result = super().__call__(call)
            return Gated(call.x_TD * 3) if isinstance(call, Gate) and call.layer in dense else result

    stages = Dense()
    x_TD = drive(layer_loop(shape_of(3), IDS_T, LENGTHS_B), stages)
    assert [call.layer for call in stages.asked if isinstance(call, ApplyExperts)] == sorted({0, 1, 2} - dense)
    gates = [call for call in stages.asked if isinstance(call, Gate)]
    assert [call.layer for call in gates] == [0, 1, 2]
    for layer in dense:
        after = x_TD if layer == 2 else gates[layer + 1].x_TD
        assert equal_bits(after, gates[layer].x_TD * 3)


@pytest.mark.parametrize("multiplier", [1.0, 0.22, 3.0])
def test_the_residual_multiplier_scales_what_experts_add(multiplier: float) -> None:
    stages = ScriptedStages()
    x_TD = drive(layer_loop(shape_of(1, residual_multiplier=multiplier), IDS_T, LENGTHS_B), stages)
    gated = stages(stages.asked[1])
    plan = plan_dispatch(gated.expert_ids_TK, 4)
    rows_ND = stages(stages.asked[2]).rows_ND
    routed_TD = combine(np.zeros_like(x_TD), rows_ND, gated.weights_TK, plan)
    assert equal_bits(x_TD, gated.residual_TD + np.float32(multiplier) * routed_TD)


@hypotheses
@given(routings(), st.integers(0, 2**31), st.floats(0.01, 9))
def test_a_multiplied_combine_gives_the_same_bits_in_numpy_and_in_torch(
    routing: tuple[np.ndarray, int], seed: int, multiplier: float
) -> None:
    residual_TD, rows_ND, weights_TK, plan = combine_inputs(routing, seed)
    in_torch = combine(*(torch.from_numpy(each) for each in (residual_TD, rows_ND, weights_TK)), plan, multiplier)
    assert equal_bits(in_torch, combine(residual_TD, rows_ND, weights_TK, plan, multiplier))


# drive


async def test_driven_by_coroutines_it_asks_and_gives_the_same() -> None:
    direct, remote = ScriptedStages(), ScriptedStages()

    async def answer(call: StageCall) -> Any:
        await asyncio.sleep(0)
        return remote(call)

    wanted, got = drive(loop(), direct), await drive_async(loop(), answer)
    assert equal_bits(got.logits_BC, wanted.logits_BC)
    assert equal_bits(got.probabilities_BC, wanted.probabilities_BC)
    for one, other in zip(remote.asked, direct.asked, strict=True):
        assert type(one) is type(other)
        assert all(equal_bits(value, vars(other)[name]) for name, value in vars(one).items())


class StageError(Exception):
    pass


@pytest.mark.parametrize("broken", [Embed, Gate, ApplyExperts, Score])
async def test_an_exception_in_a_stage_propagates_and_nothing_more_is_asked(broken: type) -> None:
    for asynchronous in (False, True):
        stages = ScriptedStages()

        def answer(call: StageCall, stages: ScriptedStages = stages) -> Any:
            result = stages(call)
            if isinstance(call, broken):
                raise StageError
            return result

        async def answer_later(call: StageCall, answer: Callable[[StageCall], Any] = answer) -> Any:
            return answer(call)

        with pytest.raises(StageError):
            _ = await drive_async(loop(), answer_later) if asynchronous else drive(loop(), answer)
        assert isinstance(stages.asked[-1], broken)
        assert sum(isinstance(call, broken) for call in stages.asked) == 1


async def test_a_cancelled_drive_asks_nothing_more() -> None:
    stages, reached = ScriptedStages(), asyncio.Event()

    async def answer(call: StageCall) -> Any:
        result = stages(call)
        if isinstance(call, ApplyExperts):
            reached.set()
            await asyncio.Event().wait()
        return result

    task = asyncio.create_task(drive_async(loop(), answer))
    await reached.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [type(call) for call in stages.asked] == [Embed, Gate, ApplyExperts]


@pytest.mark.parametrize("asynchronous", [False, True])
async def test_an_exception_in_a_stage_closes_the_loop(asynchronous: bool) -> None:
    def answer(call: StageCall) -> Any:
        raise StageError

    async def answer_later(call: StageCall) -> Any:
        raise StageError

    held = loop()
    with pytest.raises(StageError):
        _ = await drive_async(held, answer_later) if asynchronous else drive(held, answer)
    assert inspect.getgeneratorstate(held) == inspect.GEN_CLOSED


def test_a_stop_iteration_in_a_stage_is_never_taken_for_the_scores() -> None:
    nothing_left: list[Any] = []
    with pytest.raises((StopIteration, RuntimeError)):
        drive(loop(), lambda call: next(iter(nothing_left)))


def test_dispatch_needs_no_torch() -> None:
    command = "import expertmesh.dispatch, sys; sys.exit('torch' in sys.modules)"
    root = Path(expertmesh.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", command], cwd=root, check=False).returncode == 0
