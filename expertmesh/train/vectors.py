"""Token vectors from the training texts alone: who stands beside whom, before any label is looked at.

Positive pointwise mutual information of tokens within a window, factorised by a truncated SVD. It gives what skip-gram
gives, in seconds (Levy and Goldberg, "Neural Word Embedding as Implicit Matrix Factorization", NIPS 2014; context
smoothing and the exponent of the singular values from Levy, Goldberg and Dagan, TACL 2015).
"""

from __future__ import annotations

import torch
from torch import Tensor

WINDOW = 8
CONTEXT_SMOOTHING = 0.75
SINGULAR_VALUE_EXPONENT = 0.5
OVERSAMPLING = 32
ITERATIONS = 4


def token_vectors(ids_T: Tensor, lengths_B: Tensor, vocab: int, width: int, std: float) -> Tensor:
    """Gives start values for an embedding [vocab, width] with standard deviation `std`.

    Args:
        ids_T: Token ids of all texts, one after another.
        lengths_B: Tokens of each text.
        vocab: Number of ids.
        width: Width of a vector; at most `vocab`.
        std: Over all vectors of tokens that occur; other vectors are zero.
    """
    pmi_VV = _positive_pmi(ids_T, lengths_B, vocab)
    left_VD, values_D, _ = torch.svd_lowrank(pmi_VV, q=min(width + OVERSAMPLING, vocab), niter=ITERATIONS)
    vectors_VD = left_VD[:, :width] * values_D[:width] ** SINGULAR_VALUE_EXPONENT
    seen_V = vectors_VD.abs().sum(dim=1) > 0
    return vectors_VD * (std / vectors_VD[seen_V].std())


def _positive_pmi(ids_T: Tensor, lengths_B: Tensor, vocab: int) -> Tensor:
    """max(0, log p(a, b) / (p(a) p(b)^0.75)) as a sparse matrix [vocab, vocab]; nearer pairs count more."""
    text_T = torch.repeat_interleave(torch.arange(len(lengths_B)), lengths_B)
    counts_VV = _sparse(torch.empty(2, 0, dtype=torch.int64), torch.empty(0), vocab)
    for distance in range(1, WINDOW + 1):
        together = text_T[distance:] == text_T[:-distance]
        pairs = torch.stack([ids_T[:-distance][together], ids_T[distance:][together]])
        weights = torch.full((pairs.shape[1],), (WINDOW + 1 - distance) / WINDOW)
        both = torch.cat([pairs, pairs.flip(0)], dim=1)
        counts_VV = (counts_VV + _sparse(both, weights.repeat(2), vocab)).coalesce()
    (rows, columns), counts = counts_VV.indices(), counts_VV.values()
    row_V = torch.zeros(vocab).index_add_(0, rows, counts)
    smoothed_V = row_V**CONTEXT_SMOOTHING
    pmi = torch.log(counts * smoothed_V.sum() / (row_V[rows] * smoothed_V[columns]))
    kept = pmi > 0
    return _sparse(torch.stack([rows[kept], columns[kept]]), pmi[kept], vocab).coalesce()


def _sparse(places: Tensor, values: Tensor, vocab: int) -> Tensor:
    return torch.sparse_coo_tensor(places, values, (vocab, vocab), check_invariants=True)
