"""The order of a model's stages, written once and without IO, and the row arithmetic between them.

`layer_loop` asks for stage calls and is sent their results. The full model answers it by calling its own
stages, the gateway by RPC; both therefore compute the same thing in the same order.

Arrays may be numpy's or torch's: nothing is used here but indexing, `*` and `+`, which are exact in IEEE 754
and so give the same bits in both. Only `leave_out`, which no full model ever needs, is for numpy's alone.
This module opens no socket, imports no torch and knows no weights.

Shapes: T token rows of all sequences, B sequences, D model width, E experts, K experts per token,
N = T*K dispatched rows, sorted by expert.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

Array = Any  # numpy.ndarray or torch.Tensor
Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Embed:
    """Asks for the embedding of `ids_T`, the token ids of B sequences one after another; answered by `x_TD`."""

    ids_T: Array
    lengths_B: Array


@dataclass(frozen=True)
class Gate:
    """Asks for attention and routing of one layer; answered by a `Gated`."""

    layer: int
    x_TD: Array
    lengths_B: Array


@dataclass(frozen=True)
class Gated:
    """What gating gives: the residual stream, the experts' input, and which expert serves which row how much.

    `expert_ids_TK` ascend along K, so that the combine adds in ascending expert order. A layer without experts gives
    the residual stream alone, with everything in it. Where `shared_is_due`, what the shared experts add is not in it
    yet: they are asked together with the routed ones.
    """

    residual_TD: Array
    expert_input_TD: Array = None
    expert_ids_TK: Array = None
    weights_TK: Array = None
    shared_is_due: bool = False


@dataclass(frozen=True)
class ApplyExperts:
    """Asks for the experts of one layer; answered by an `Applied`.

    `rows_ND` are sorted by expert: the first `counts_E[0]` belong to expert 0, and so on. `shared_input_TD` is for the
    shared experts, where they are due.
    """

    layer: int
    rows_ND: Array
    counts_E: Int64Array
    shared_input_TD: Array = None

    def slices(self) -> list[tuple[int, slice]]:
        """Gives (expert, rows) for every expert that has rows."""
        given: list[tuple[int, slice]] = []
        start = 0
        for expert, count in enumerate(self.counts_E.tolist()):
            if count:
                given.append((expert, slice(start, start + count)))
                start += count
        return given


@dataclass(frozen=True)
class Applied:
    """Rows of the routed experts, in the order they were given, and of the shared ones where they were due; float32.

    Rows of experts that are `missing` may hold anything: they are left out.
    """

    rows_ND: Array
    shared_TD: Array = None
    missing: Sequence[int] = ()


@dataclass(frozen=True)
class Score:
    """Asks the head for the scores of every sequence; answered by a `Scores`."""

    x_TD: Array
    lengths_B: Array


@dataclass(frozen=True)
class Scores:
    """Logits and probabilities, one row per sequence, one column per class."""

    logits_BC: Array
    probabilities_BC: Array


StageCall = Embed | Gate | ApplyExperts | Score
ResultT = TypeVar("ResultT")
Loop = Generator[StageCall, Any, ResultT]


class Shape(Protocol):
    """What the loop has to know of a model; `model.spec.ModelSpec` says it."""

    @property
    def layers(self) -> int:
        """Number of layers."""

    @property
    def router(self) -> Any:
        """`router.experts` is the number of experts of a layer that has some."""

    @property
    def residual_multiplier(self) -> float:
        """Factor on what the experts add to the residual stream."""


@dataclass(frozen=True)
class DispatchPlan:
    """Where each (token, choice) pair goes: a permutation of N = T*K rows.

    Attributes:
        counts_E: Rows per expert.
        row2token: Token of each dispatched row, sorted by expert.
        choice2row_TK: Dispatched row of each (token, choice).
    """

    counts_E: Int64Array
    row2token: Int64Array
    choice2row_TK: Int64Array


def plan_dispatch(expert_ids_TK: Array, experts: int) -> DispatchPlan:
    """Sorts (token, choice) pairs by expert; tokens keep their order within an expert.

    Args:
        expert_ids_TK: Chosen experts; every id in [0, experts).
        experts: Number of experts E of the layer.
    """
    ids_TK = np.asarray(expert_ids_TK)
    tokens, choices = ids_TK.shape
    row2choice = np.argsort(ids_TK.reshape(-1), kind="stable")
    choice2row = np.empty(tokens * choices, dtype=np.int64)
    choice2row[row2choice] = np.arange(tokens * choices)
    return DispatchPlan(
        counts_E=np.bincount(ids_TK.reshape(-1), minlength=experts).astype(np.int64),
        row2token=row2choice // choices,
        choice2row_TK=choice2row.reshape(tokens, choices),
    )


def combine(
    residual_TD: Array, expert_rows_ND: Array, weights_TK: Array, plan: DispatchPlan, multiplier: float = 1.0
) -> Array:
    """Adds the weighted expert rows to the residual: choice after choice, in ascending expert order, in fp32."""
    routed_TD = weights_TK[:, :1] * expert_rows_ND[plan.choice2row_TK[:, 0]]
    for choice in range(1, plan.choice2row_TK.shape[1]):
        routed_TD = routed_TD + weights_TK[:, choice : choice + 1] * expert_rows_ND[plan.choice2row_TK[:, choice]]
    return add(residual_TD, routed_TD, multiplier)


def leave_out(
    missing: Sequence[int], rows_ND: Array, expert_ids_TK: Array, weights_TK: Array, plan: DispatchPlan
) -> tuple[Array, Array]:
    """Makes rows and weights of which `combine` makes what the experts give that are not missing.

    The weights of a token's other experts are made to sum to what they summed to before; a token that wanted none of
    the missing ones keeps the bits of its weights. The rows left out are -0.0, which adds nothing to any number.

    Args:
        missing: Experts of this layer.
        rows_ND: Rows of experts, as numpy's; those of missing ones may hold anything.
        expert_ids_TK: Chosen experts.
        weights_TK: Their weights, as numpy's.
        plan: Of these.

    Returns:
        Rows and weights.
    """
    is_missing_TK = np.isin(np.asarray(expert_ids_TK), missing)
    kept_TK = np.where(is_missing_TK, np.float32(0), weights_TK)
    whole_T1, left_T1 = weights_TK.sum(axis=1, keepdims=True), kept_TK.sum(axis=1, keepdims=True)
    is_to_mend_T1 = is_missing_TK.any(axis=1, keepdims=True) & (left_T1 != 0)
    mended_TK = np.divide(kept_TK, left_T1, out=kept_TK.copy(), where=is_to_mend_T1)
    mended_TK = np.multiply(mended_TK, whole_T1, out=mended_TK, where=is_to_mend_T1)
    mended_TK[is_missing_TK] = 0  # of a sign that leaves -0.0 as it is
    is_missing_N = np.zeros(len(rows_ND), np.bool_)
    is_missing_N[plan.choice2row_TK[is_missing_TK]] = True
    return np.where(is_missing_N[:, None], np.float32(-0.0), rows_ND), mended_TK


def add(residual_TD: Array, more_TD: Array, multiplier: float = 1.0) -> Array:
    """Adds something to the residual stream."""
    return residual_TD + (more_TD if multiplier == 1.0 else more_TD * multiplier)


def layer_loop(shape: Shape, ids_T: Array, lengths_B: Array) -> Loop[Array]:
    """The way of a step through the layers: embed, then per layer gate, dispatch and combine.

    Args:
        shape: The model's.
        ids_T: Token ids of all sequences, one after another, without padding.
        lengths_B: Rows of each sequence; they sum to T.

    Yields:
        A `StageCall`; send its result back in.

    Returns:
        x_TD, the residual stream after the last layer.
    """
    x_TD = yield Embed(ids_T, lengths_B)
    for layer in range(shape.layers):
        gated = yield Gate(layer, x_TD, lengths_B)
        if gated.expert_ids_TK is None:
            x_TD = gated.residual_TD
            continue
        plan = plan_dispatch(gated.expert_ids_TK, shape.router.experts)
        expert_input_TD = gated.expert_input_TD
        shared_input_TD = expert_input_TD if gated.shared_is_due else None
        applied = yield ApplyExperts(layer, expert_input_TD[plan.row2token], plan.counts_E, shared_input_TD)
        residual_TD = gated.residual_TD
        if gated.shared_is_due:
            residual_TD = add(residual_TD, applied.shared_TD, shape.residual_multiplier)
        rows_ND, weights_TK = applied.rows_ND, gated.weights_TK
        if applied.missing:
            rows_ND, weights_TK = leave_out(applied.missing, rows_ND, gated.expert_ids_TK, weights_TK, plan)
        x_TD = combine(residual_TD, rows_ND, weights_TK, plan, shape.residual_multiplier)
    return x_TD


def classify(shape: Shape, ids_T: Array, lengths_B: Array) -> Loop[Scores]:
    """The layer loop, and then the scores of every sequence."""
    x_TD = yield from layer_loop(shape, ids_T, lengths_B)
    scores: Scores = yield Score(x_TD, lengths_B)
    return scores


def drive(loop: Loop[ResultT], answer: Callable[[StageCall], Any]) -> ResultT:
    """Runs a loop to its end with a function that answers each call."""
    with closing(loop):
        call = next(loop)
        while True:
            result = answer(call)
            try:
                call = loop.send(result)
            except StopIteration as stop:
                outcome: ResultT = stop.value
                return outcome


async def drive_async(loop: Loop[ResultT], answer: Callable[[StageCall], Awaitable[Any]]) -> ResultT:
    """Runs a loop to its end with a coroutine that answers each call."""
    with closing(loop):
        call = next(loop)
        while True:
            result = await answer(call)
            try:
                call = loop.send(result)
            except StopIteration as stop:
                outcome: ResultT = stop.value
                return outcome
