"""A second opinion on every training row: what a linear model thinks of it that has not seen it.

Logistic regression on TF-IDF of word uni- and bigrams is fitted on all folds but one and asked about that one
(cross-fitting), so its probabilities tell how clear a row is and not what its label says. Mixed into the targets
they soften rows that are mislabelled or belong to two classes. It is used in training only.
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

BIGRAM_MULTIPLIER = 1_000_003
MIN_TEXTS = 2
FOLDS = 5
STRENGTH = 10.0
ITERATIONS = 25
HISTORY = 6


def cross_fitted(texts: Sequence[str], labels_B: Tensor, classes: int, seed: int) -> Tensor:
    """Gives the probabilities [B, classes] that models fitted on the other folds give to each normalised text.

    Args:
        texts: Words apart by spaces.
        labels_B: Class of each text.
        classes: Number of classes.
        seed: Of the folds.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
        features_BF = tfidf(texts)
    fold_B = torch.from_numpy(np.random.default_rng(seed).permutation(len(texts)) % FOLDS)
    probabilities_BC = torch.empty(len(texts), classes)
    for fold in range(FOLDS):
        others, own = torch.nonzero(fold_B != fold)[:, 0], torch.nonzero(fold_B == fold)[:, 0]
        weights_FC = _fit(_rows(features_BF, others), labels_B[others], classes)
        probabilities_BC[own] = torch.softmax(_rows(features_BF, own) @ weights_FC, dim=1)
    return probabilities_BC


def tfidf(texts: Sequence[str]) -> Tensor:
    """Word uni- and bigrams that appear in `MIN_TEXTS` texts, as a sparse CSR matrix [B, F] of rows of length 1."""
    hashes: dict[str, int] = {}
    rows, grams = [], []
    for row, text in enumerate(texts):
        words = [hashes.setdefault(word, zlib.crc32(word.encode("utf-8", "surrogatepass"))) for word in text.split()]
        grams += words + [first * BIGRAM_MULTIPLIER + second for first, second in pairwise(words)]
        rows += [row] * max(2 * len(words) - 1, 0)
    _, feature = np.unique(np.array(grams, np.int64), return_inverse=True)
    pairs, counts = np.unique(np.array(rows, np.int64) * len(grams) + feature.reshape(-1), return_counts=True)
    row, feature = np.divmod(pairs, max(len(grams), 1))
    often = np.bincount(feature)[feature] >= MIN_TEXTS
    row, counts = row[often], counts[often]
    kept, column, appears_F = np.unique(feature[often], return_inverse=True, return_counts=True)
    values = (1 + np.log(counts)) * (1 + np.log((1 + len(texts)) / (1 + appears_F[column])))
    values /= np.sqrt(np.bincount(row, weights=values**2, minlength=len(texts)))[row]
    starts = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(texts)))])
    parts = (torch.from_numpy(starts), torch.from_numpy(column), torch.from_numpy(values).float())
    return torch.sparse_csr_tensor(*parts, size=(len(texts), max(len(kept), 1)), check_invariants=False)


def _rows(features_BF: Tensor, rows: Tensor) -> Tensor:
    starts, columns, values = features_BF.crow_indices(), features_BF.col_indices(), features_BF.values()
    lengths = (starts[1:] - starts[:-1])[rows]
    ends = torch.cumsum(lengths, 0)
    cells = torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts[rows] - (ends - lengths), lengths)
    new_starts = torch.cat([ends.new_zeros(1), ends])
    return torch.sparse_csr_tensor(
        new_starts, columns[cells], values[cells], size=(len(rows), features_BF.shape[1]), check_invariants=False
    )


def _transposed(features_BF: Tensor) -> Tensor:
    starts, columns = features_BF.crow_indices(), features_BF.col_indices()
    rows = torch.repeat_interleave(torch.arange(len(starts) - 1), starts[1:] - starts[:-1])
    order = torch.argsort(columns, stable=True)
    new_starts = torch.cat(
        [starts.new_zeros(1), torch.cumsum(torch.bincount(columns, minlength=features_BF.shape[1]), 0)]
    )
    parts = (new_starts, rows[order], features_BF.values()[order])
    return torch.sparse_csr_tensor(*parts, size=(features_BF.shape[1], len(starts) - 1), check_invariants=False)


def _fit(features_BF: Tensor, labels_B: Tensor, classes: int) -> Tensor:
    """Minimises `STRENGTH` times the summed cross entropy plus half the squared weights."""
    wanted_BC = torch.nn.functional.one_hot(labels_B, classes).float()
    transposed_FB = _transposed(features_BF)
    weights_FC = torch.zeros(features_BF.shape[1], classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights_FC], lr=1.0, max_iter=ITERATIONS, history_size=HISTORY, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        with torch.no_grad():
            log_BC = torch.log_softmax(features_BF @ weights_FC, dim=1)
            loss = -(wanted_BC * log_BC).sum() + weights_FC.square().sum() / (2 * STRENGTH)
            weights_FC.grad = transposed_FB @ (log_BC.exp() - wanted_BC) + weights_FC / STRENGTH
        return float(loss)

    optimizer.step(closure)  # type: ignore[arg-type, no-untyped-call]
    return weights_FC.detach()
