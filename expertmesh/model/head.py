"""Heads: the last norm and what becomes of the rows, classes or next-token logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertmesh.dispatch import Scores
from expertmesh.model import cuda
from expertmesh.model.layers import NO_DROPOUT, Dropout, Linear, norm
from expertmesh.model.sequences import Sequences
from expertmesh.model.spec import ModelSpec


class ClassifierStage(nn.Module):
    """Last norm, pooling over a sequence's tokens, classes."""

    def __init__(self, spec: ModelSpec, dropout: Dropout = NO_DROPOUT) -> None:
        super().__init__()
        self.pool = spec.head.pool
        self.norm = norm(spec.width, spec.norm)
        self.out = Linear(spec.width * (2 if self.pool == "mean_max" else 1), len(spec.head.labels))
        self.dropout = nn.Dropout(dropout.head)

    def forward(self, x_TD: Tensor, sequences: Sequences) -> Scores:
        """x_TD to logits and probabilities [B, C] in fp32."""
        logits_BC = self.out(self.dropout(self._pooled(self.norm(x_TD), sequences))).float()
        return Scores(logits_BC, F.softmax(logits_BC, dim=-1))

    def _pooled(self, x_TD: Tensor, sequences: Sequences) -> Tensor:
        widths = x_TD.shape[1] * (2 if self.pool == "mean_max" else 1)
        pooled_BD = x_TD.new_empty(sequences.lengths_B.shape[0], widths)
        for group in sequences.groups:
            x_NLD = x_TD[group.rows_NL]
            parts = []
            if self.pool != "max":
                inside_NLD = x_NLD * group.inside_NL[:, :, None]
                total_ND = cuda.row_sums(inside_NLD.mT) if cuda.serves(x_NLD) else inside_NLD.sum(dim=1)
                parts.append(total_ND / group.lengths_N[:, None])
            if self.pool != "mean":
                parts.append(x_NLD.amax(dim=1))
            pooled_BD = pooled_BD.index_put((group.members_N,), torch.cat(parts, dim=1))
        return pooled_BD


class LanguageHead(nn.Module):
    """Last norm and next-token logits of every row it is given."""

    def __init__(self, spec: ModelSpec, dropout: Dropout = NO_DROPOUT) -> None:
        super().__init__()
        self.norm = norm(spec.width, spec.norm)
        self.out = Linear(spec.width, spec.embedding.vocab, bias=spec.head.bias)
        self.divisor = spec.head.divisor
        self.dropout = nn.Dropout(dropout.head)

    def forward(self, x_TD: Tensor) -> Tensor:
        """x_TD to logits_TV in fp32."""
        logits_TV: Tensor = self.out(self.dropout(self.norm(x_TD)).to(self.out.weight.dtype)).float()
        return logits_TV if self.divisor == 1.0 else logits_TV / self.divisor


def head(spec: ModelSpec, dropout: Dropout = NO_DROPOUT) -> ClassifierStage | LanguageHead:
    """The head that a spec asks for."""
    return LanguageHead(spec, dropout) if spec.generates else ClassifierStage(spec, dropout)
