"""The stages of a model, one module each. A service loads one of them, the full model all.

Every module works on the token rows of many sequences at once (`x_TD`), without padding, and is written with the
operations of `invariant`. Dropout is active in training only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expertmesh.dispatch import Gated, Scores
from expertmesh.model import invariant
from expertmesh.model.sequences import Sequences
from expertmesh.model.spec import ModelSpec

BIGRAM_MULTIPLIER = 1_000_003
FIRST_TOKEN_PREDECESSOR = 1


@dataclass(frozen=True)
class Dropout:
    """Training-time dropout rates; all zero when serving."""

    embedding: float = 0.0
    attention: float = 0.0
    expert: float = 0.0
    head: float = 0.0


NO_DROPOUT = Dropout()


class Linear(nn.Linear):
    """A linear layer whose rows do not depend on their company."""

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, in] to [N, out]."""
        return invariant.linear(x_ND, self.weight, self.bias)


def _table(rows: int, width: int) -> nn.Embedding:
    """An embedding; on the meta device without random numbers, for which torch would import its compiler."""
    weight = torch.empty(rows, width)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding(rows, width, _weight=weight)


class EmbeddingStage(nn.Module):
    """Token ids to rows: token, position and hashed-bigram embeddings added."""

    def __init__(self, spec: ModelSpec, dropout: Dropout = NO_DROPOUT) -> None:
        super().__init__()
        embedding = spec.embedding
        self.token = _table(embedding.vocab, spec.width)
        self.position = _table(spec.context, spec.width)
        self.bigram_buckets = embedding.bigram_buckets
        if self.bigram_buckets:
            self.bigram = _table(embedding.bigram_buckets, embedding.bigram_width)
            self.bigram_out = Linear(embedding.bigram_width, spec.width, bias=False)
        self.dropout = nn.Dropout(dropout.embedding)

    def forward(self, ids_T: Tensor, sequences: Sequences) -> Tensor:
        """ids_T to x_TD; every sequence is at most `context` long and every id below `vocab`."""
        x_TD: Tensor = self.token(ids_T) + self.position(sequences.positions_T)
        if self.bigram_buckets:
            x_TD = x_TD + self.bigram_out(self.bigram(self._bigrams(ids_T, sequences)))
        return self.dropout(x_TD)  # type: ignore[no-any-return]

    def _bigrams(self, ids_T: Tensor, sequences: Sequences) -> Tensor:
        previous_T = torch.roll(ids_T, 1)
        previous_T[sequences.starts_B] = FIRST_TOKEN_PREDECESSOR
        return (previous_T * BIGRAM_MULTIPLIER + ids_T) % self.bigram_buckets


class GatingStage(nn.Module):
    """One layer's attention and router: rows to the residual stream, the experts' input and the routes."""

    def __init__(self, spec: ModelSpec, dropout: Dropout = NO_DROPOUT) -> None:
        super().__init__()
        self.heads = spec.attention.heads
        self.top_k = spec.router.top_k
        self.renormalise = spec.router.renormalise
        self.attention_norm = nn.LayerNorm(spec.width, eps=spec.norm.eps)
        self.qkv = Linear(spec.width, 3 * spec.width)
        self.out = Linear(spec.width, spec.width)
        self.expert_norm = nn.LayerNorm(spec.width, eps=spec.norm.eps)
        self.router = Linear(spec.width, spec.router.experts, bias=False)
        self.dropout = nn.Dropout(dropout.attention)

    def forward(self, x_TD: Tensor, sequences: Sequences) -> Gated:
        """x_TD to a `Gated` with int64 expert ids and fp32 weights."""
        residual_TD, expert_input_TD = self.attend(x_TD, sequences)
        ids_TK, weights_TK = self.route(self.router_logits(expert_input_TD))
        return Gated(residual_TD, expert_input_TD, ids_TK, weights_TK)

    def attend(self, x_TD: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and its norm, which router and experts see."""
        attended_TD = self._attention(self.attention_norm(x_TD), sequences)
        residual_TD = x_TD + self.dropout(self.out(attended_TD))
        return residual_TD, self.expert_norm(residual_TD)

    def router_logits(self, expert_input_TD: Tensor) -> Tensor:
        """The router's score of each expert, [T, E] in fp32."""
        with torch.autocast(expert_input_TD.device.type, enabled=False):
            return self.router(expert_input_TD.float())  # type: ignore[no-any-return]

    def route(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The best K experts of each row, ascending by expert, and their weights."""
        top_TK, ids_TK = torch.topk(torch.softmax(logits_TE, dim=-1), self.top_k, dim=-1)
        if self.renormalise:
            top_TK = top_TK / top_TK.sum(dim=-1, keepdim=True)
        ids_TK, order_TK = torch.sort(ids_TK, dim=-1)
        return ids_TK, torch.gather(top_TK, 1, order_TK)

    def _attention(self, x_TD: Tensor, sequences: Sequences) -> Tensor:
        rows, width = x_TD.shape
        qkv = self.qkv(x_TD)
        attended_TD = torch.empty_like(qkv[:, :width])
        for group in sequences.groups:
            n, length = group.rows_NL.shape
            q, k, v = qkv[group.rows_NL].view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            mixed = invariant.bidirectional_attention(q, k, v, group.lengths_N)
            flat = mixed.transpose(1, 2).reshape(n, length, width)
            attended_TD = attended_TD.index_put((group.rows_NL[group.inside_NL],), flat[group.inside_NL])
        return attended_TD


class Expert(nn.Module):
    """One expert of one layer: a pure function of rows."""

    def __init__(self, spec: ModelSpec, dropout: Dropout = NO_DROPOUT) -> None:
        super().__init__()
        self.gate = Linear(spec.width, spec.expert.width, bias=False)
        self.up = Linear(spec.width, spec.expert.width, bias=False)
        self.down = Linear(spec.expert.width, spec.width, bias=False)
        self.dropout = nn.Dropout(dropout.expert)

    def forward(self, rows_ND: Tensor) -> Tensor:
        """[N, D] to [N, D], unweighted."""
        return self.down(self.dropout(invariant.silu(self.gate(rows_ND)) * self.up(rows_ND)))  # type: ignore[no-any-return]


class ClassifierStage(nn.Module):
    """The head: last norm, pooling over a sequence's tokens, classes."""

    def __init__(self, spec: ModelSpec, dropout: Dropout = NO_DROPOUT) -> None:
        super().__init__()
        self.pool = spec.head.pool
        self.norm = nn.LayerNorm(spec.width, eps=spec.norm.eps)
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
                total_ND = (x_NLD * group.inside_NL[:, :, None]).sum(dim=1)
                parts.append(total_ND / group.lengths_N[:, None])
            if self.pool != "mean":
                parts.append(x_NLD.amax(dim=1))
            pooled_BD = pooled_BD.index_put((group.members_N,), torch.cat(parts, dim=1))
        return pooled_BD
