"""Choosing the next token: one row of logits and one draw give one token, whatever else is computed beside them.

A row goes through, in this order: repetition penalty, temperature, top-k, top-p, min-p, and a draw from what is left.
Everything happens row by row in float64 with numpy, so neither company, order nor number of threads can change a bit.
The only random number is a function of seed, choice and position (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011): the same seed gives the same tokens on every replica and after every failover.

Equal scores are told apart by id, the lower one first. The draw inverts the cumulative distribution in ascending order
of ids, for which nothing needs sorting.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from expertmesh.errors import NotFinite
from expertmesh.model.arrays import to_numpy

_Array = npt.NDArray[Any]

NO_LOGPROBS = -1
_CLASSES_PER_NAT = 64
_LAST_CLASS = 64 * _CLASSES_PER_NAT  # of tokens that are e**64 times less likely than the likeliest, and less


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the message of the same name, checked.

    Attributes:
        temperature: Logits are divided by it; 0 takes the likeliest token.
        top_k: Only the k likeliest; 0 for no limit.
        top_p: The fewest likeliest tokens whose probabilities reach this; 1 for all.
        min_p: Only tokens at least this times as likely as the likeliest; 0 for all.
        repetition_penalty: Logits of seen ids are divided by it where positive, multiplied where negative.
        seed: Key of the random numbers, below 2**64.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Draw:
    """How one token is chosen.

    Attributes:
        sampling: See there.
        choice: Which of the answers to a prompt this is.
        position: Position of the new token in its sequence.
        seen: Ids in the sequence so far, in any order, repeated or not; may be empty where there is no penalty.
        logprobs: How many of the likeliest tokens to tell; -1 for no log probability at all.
    """

    sampling: Sampling
    choice: int = 0
    position: int = 0
    seen: Sequence[int] = ()
    logprobs: int = NO_LOGPROBS


@dataclass(frozen=True)
class Token:
    """A chosen token.

    Attributes:
        id: Its id.
        logprob: Natural logarithm of the model's own probability of it; 0 if it was not asked for.
        top: Ids and log probabilities of the likeliest tokens, likeliest first.
    """

    id: int
    logprob: float
    top: list[tuple[int, float]]


def sample(logits_BV: Tensor, draws: Sequence[Draw]) -> list[Token]:
    """Chooses a token for each row.

    Args:
        logits_BV: The model's own logits, on any device.
        draws: One for each row.

    Raises:
        NotFinite: Logits are not finite, from which no token may be taken.
    """
    rows_BV = np.ascontiguousarray(to_numpy(logits_BV.float()))
    return [_token(row_V, draw, row) for row, (row_V, draw) in enumerate(zip(rows_BV, draws, strict=True))]


def _token(row_V: _Array, draw: Draw, row: int) -> Token:
    if not np.isfinite(row_V).all():
        raise NotFinite(f"the head computed logits that are not finite, in row {row}")
    chosen = _choose(penalised(row_V, draw), draw)
    if draw.logprobs == NO_LOGPROBS:
        return Token(chosen, 0.0, [])
    log_total = _log_sum_exp(row_V)
    top_N = _descending(row_V, _likeliest(row_V, draw.logprobs)) if draw.logprobs else ()
    return Token(chosen, float(row_V[chosen]) - log_total, [(int(id), float(row_V[id]) - log_total) for id in top_N])


def _choose(scores_V: _Array, draw: Draw) -> int:
    if draw.sampling.temperature == 0:
        return int(np.argmax(scores_V))  # the first of equals
    ids_N, weights_N = survivors(scores_V, draw.sampling)
    reached_N = np.cumsum(weights_N)
    target = uniform(draw.sampling.seed, draw.choice, draw.position) * reached_N[-1]
    return int(ids_N[np.searchsorted(reached_N, target, side="right")])


def uniform(seed: int, choice: int, position: int) -> float:
    """The random number of one draw, in [0, 1): 53 bits of Philox 4x64-10, key (seed, choice), counter `position`."""
    generator = np.random.Philox(key=np.array([seed, choice], np.uint64), counter=position)
    return float((int(generator.random_raw()) >> 11) * 2.0**-53)


def penalised(row_V: _Array, draw: Draw) -> _Array:
    """A row after the repetition penalty (Keskar et al., "CTRL", 2019), which counts an id once however often seen."""
    penalty = draw.sampling.repetition_penalty
    if penalty == 1 or not len(draw.seen):
        return row_V
    scores_V = row_V.astype(np.float64)
    seen_N = np.asarray(draw.seen, np.int64)
    seen_scores_N = scores_V[seen_N]
    scores_V[seen_N] = np.where(seen_scores_N < 0, seen_scores_N * penalty, seen_scores_N / penalty)
    return scores_V


def survivors(scores_V: _Array, sampling: Sampling) -> tuple[_Array, _Array]:
    """What may be drawn at a temperature that is not 0.

    Each step sees the probabilities of what the step before has left.

    Returns:
        ids_N, ascending, and weights_N, float64: probabilities but for a factor, the likeliest has 1.
    """
    if 0 < sampling.top_k < len(scores_V):
        ids_N = _likeliest(scores_V, sampling.top_k)
        scores_V = scores_V[ids_N]
    else:
        ids_N = np.arange(len(scores_V))
    scores_N = scores_V / np.float64(sampling.temperature)  # float64 holds the quotient, however small the divisor
    weights_N = np.exp(scores_N - scores_N.max())
    if sampling.top_p < 1:
        kept_N = _nucleus(scores_N, weights_N, sampling.top_p)
        ids_N, weights_N = ids_N[kept_N], weights_N[kept_N]
    if sampling.min_p > 0:
        kept_N = weights_N >= sampling.min_p
        ids_N, weights_N = ids_N[kept_N], weights_N[kept_N]
    return ids_N, weights_N


def _nucleus(scores_N: _Array, weights_N: _Array, top_p: float) -> _Array:
    """Places, ascending, of the fewest highest scores whose weights reach `top_p` of all (Holtzman et al., 2020).

    Scores are sorted only where it matters: they are put into narrow classes, the best first, and one class is split.
    """
    class_N = np.minimum((scores_N.max() - scores_N) * _CLASSES_PER_NAT, _LAST_CLASS).astype(np.int64)
    reached_C = np.cumsum(np.bincount(class_N, weights_N))
    target = top_p * reached_C[-1]
    split = int(np.searchsorted(reached_C, target))
    order_M = _descending(scores_N, np.flatnonzero(class_N == split))
    before = reached_C[split - 1] if split else 0.0
    needed = int(np.searchsorted(before + np.cumsum(weights_N[order_M]), target)) + 1
    kept_N = class_N < split
    kept_N[order_M[:needed]] = True
    return np.flatnonzero(kept_N)


def _likeliest(scores_N: _Array, count: int) -> _Array:
    """Places, ascending, of the `count` highest scores."""
    if count >= len(scores_N):
        return np.arange(len(scores_N))
    lowest = np.partition(scores_N, len(scores_N) - count)[len(scores_N) - count]
    places_M = np.flatnonzero(scores_N >= lowest)
    excess = len(places_M) - count
    if excess:
        places_M = np.delete(places_M, np.flatnonzero(scores_N[places_M] == lowest)[-excess:])
    return places_M


def _descending(scores_N: _Array, places_M: _Array) -> _Array:
    """Ascending places in the order of their scores, the highest first."""
    return places_M[np.argsort(-scores_N[places_M], kind="stable")]


def _log_sum_exp(row_V: _Array) -> float:
    highest = np.float64(row_V.max())
    return float(highest + np.log(np.exp(row_V - highest).sum()))
