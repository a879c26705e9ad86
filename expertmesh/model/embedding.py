"""The embedding: token ids to rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expertmesh.model.layers import NO_DROPOUT, Dropout, Linear, table
from expertmesh.model.sequences import Sequences
from expertmesh.model.spec import ModelSpec

BIGRAM_MULTIPLIER = 1_000_003
FIRST_TOKEN_PREDECESSOR = 1


class EmbeddingStage(nn.Module):
    """Token ids to rows: token, position and hashed-bigram embeddings added."""

    def __init__(self, spec: ModelSpec, dropout: Dropout = NO_DROPOUT) -> None:
        super().__init__()
        embedding = spec.embedding
        self.token = table(embedding.vocab, spec.width)
        self.multiplier = embedding.multiplier
        self.learned_positions = embedding.learned_positions
        if self.learned_positions:
            self.position = table(spec.context, spec.width)
        self.bigram_buckets = embedding.bigram_buckets
        if self.bigram_buckets:
            self.bigram = table(embedding.bigram_buckets, embedding.bigram_width)
            self.bigram_out = Linear(embedding.bigram_width, spec.width, bias=False)
        self.dropout = nn.Dropout(dropout.embedding)

    def forward(self, ids_T: Tensor, sequences: Sequences) -> Tensor:
        """ids_T to x_TD in float32; every sequence is at most `context` long and every id below `vocab`."""
        x_TD: Tensor = self.token(ids_T).float()
        if self.multiplier != 1.0:
            x_TD = x_TD * self.multiplier
        if self.learned_positions:
            x_TD = x_TD + self.position(sequences.positions_T)
        if self.bigram_buckets:
            x_TD = x_TD + self.bigram_out(self.bigram(self._bigrams(ids_T, sequences)))
        return self.dropout(x_TD)  # type: ignore[no-any-return]

    def _bigrams(self, ids_T: Tensor, sequences: Sequences) -> Tensor:
        previous_T = torch.roll(ids_T, 1)
        previous_T[sequences.starts_B] = FIRST_TOKEN_PREDECESSOR
        return (previous_T * BIGRAM_MULTIPLIER + ids_T) % self.bigram_buckets
