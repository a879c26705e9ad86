"""The whole model in one process: every stage, called directly by the layer loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
    drive,
    layer_loop,
)
from expertmesh.model.attention import gating_stage
from expertmesh.model.cache import KeyValueCache, blocks_of
from expertmesh.model.cached_sequences import CachedSequences
from expertmesh.model.embedding import EmbeddingStage
from expertmesh.model.experts import ExpertGroup
from expertmesh.model.graphs import Graphs
from expertmesh.model.head import head
from expertmesh.model.layers import NO_DROPOUT, Dropout, GatedMLP
from expertmesh.model.rotary import Rotary
from expertmesh.model.sequences import Sequences
from expertmesh.model.spec import ModelSpec
from expertmesh.model.tiles import Span

Observer = Callable[[StageCall, Any], None]


class FullModel(nn.Module):
    """Embedding, gating and experts of every layer, and the head.

    Its tensors are named as the parts of a checkpoint are: `embedding.*`, `gating.LAYER.*`,
    `experts.LAYER.EXPERT.*`, `classifier.*`.
    """

    def __init__(self, spec: ModelSpec, dropout: Dropout = NO_DROPOUT) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = EmbeddingStage(spec, dropout)
        self.gating = nn.ModuleList(gating_stage(spec, layer, dropout) for layer in range(spec.layers))
        self.experts = nn.ModuleList(
            nn.ModuleList(GatedMLP(spec.width, spec.expert, dropout.expert) for _ in range(count))
            for count in (spec.router.experts if layer in spec.sparse_layers else 0 for layer in range(spec.layers))
        )
        self.classifier = head(spec, dropout)
        self.graphs: Graphs | None = None
        self._rotary: Rotary | None = None

    def forward(self, ids_T: Tensor, lengths_B: Tensor, observe: Observer | None = None) -> Scores:
        """Classifies B sequences.

        Args:
            ids_T: int64 token ids of all sequences, one after another, without padding.
            lengths_B: Tokens of each sequence, each in [1, context].
            observe: Is shown every stage call and its result.

        Returns:
            `Scores` of torch tensors.
        """
        sequences = Sequences(lengths_B)
        scores: Scores = drive(classify(self.spec, ids_T, lengths_B), self._answers(sequences, observe))
        return scores

    def logits(self, ids_T: Tensor, lengths_B: Tensor, observe: Observer | None = None) -> Tensor:
        """Next-token logits [T, V] of B whole sequences, causal within each; differentiable in training mode."""
        sequences = Sequences(lengths_B, self.rotary) if self.training else self._in_new_cache(lengths_B.tolist())
        x_TD = self.rows(ids_T, sequences, observe)
        logits_TV: Tensor = self.classifier(x_TD)
        return logits_TV

    def rows(self, ids_T: Tensor, sequences: Sequences, observe: Observer | None = None) -> Tensor:
        """What the last layer gives for a step of a language model: x_TD."""
        x_TD: Tensor = drive(layer_loop(self.spec, ids_T, sequences.lengths_B), self._answers(sequences, observe))
        return x_TD

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.embedding.token.weight.device

    @property
    def rotary(self) -> Rotary:
        """The table of rotations, made when it is first used."""
        if self._rotary is None:
            self._rotary = Rotary(self.spec, self.device)
        return self._rotary

    def _in_new_cache(self, lengths: Sequence[int]) -> CachedSequences:
        spans = []
        used = 0
        for length in lengths:
            spans.append(Span(range(used, used + blocks_of(length)), 0, length))
            used += blocks_of(length)
        return CachedSequences(spans, KeyValueCache(self.spec, used, self.device), self.rotary, self.device)

    def _answers(self, sequences: Sequences, observe: Observer | None) -> Callable[[StageCall], Any]:
        def answer(call: StageCall) -> Any:
            result = self._answer(call, sequences)
            if observe is not None:
                observe(call, result)
            return result

        return answer

    @cached_property
    def _groups(self) -> list[ExpertGroup]:
        experts: Any = self.experts
        return [ExpertGroup(dict(enumerate(layer)), self.graphs) for layer in experts]

    def _answer(self, call: StageCall, sequences: Sequences) -> Any:
        match call:
            case Embed(ids_T=ids_T):
                return self.embedding(ids_T, sequences)
            case Gate(layer=layer, x_TD=x_TD):
                gated: Gated = self.gating[layer](x_TD, sequences)
                if gated.expert_ids_TK is None:
                    return gated
                return replace(gated, expert_ids_TK=gated.expert_ids_TK.cpu())  # the dispatch is planned on the host
            case ApplyExperts(layer=layer, rows_ND=rows_ND):
                ids = np.flatnonzero(call.counts_E)
                return Applied(self._groups[layer](ids.tolist(), call.counts_E[ids].tolist(), rows_ND).float())
            case Score(x_TD=x_TD):
                return self.classifier(x_TD, sequences)
