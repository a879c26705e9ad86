"""The whole model in one process: every stage, called directly by the layer loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from expertmesh.dispatch import ApplyExperts, Embed, Gate, Score, Scores, StageCall, drive, layer_loop
from expertmesh.model.sequences import Sequences
from expertmesh.model.spec import ModelSpec
from expertmesh.model.stages import NO_DROPOUT, ClassifierStage, Dropout, EmbeddingStage, Expert, GatingStage

Observer = Callable[[StageCall, Any], None]


class FullModel(nn.Module):
    """Embedding, gating and experts of every layer, and the classifier.

    Its tensors are named as the parts of a checkpoint are: `embedding.*`, `gating.LAYER.*`,
    `experts.LAYER.EXPERT.*`, `classifier.*`.
    """

    def __init__(self, spec: ModelSpec, dropout: Dropout = NO_DROPOUT) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = EmbeddingStage(spec, dropout)
        self.gating = nn.ModuleList(GatingStage(spec, dropout) for _ in range(spec.layers))
        self.experts = nn.ModuleList(
            nn.ModuleList(Expert(spec, dropout) for _ in range(spec.router.experts)) for _ in range(spec.layers)
        )
        self.classifier = ClassifierStage(spec, dropout)

    def forward(self, ids_T: Tensor, lengths_B: Tensor, observe: Observer | None = None) -> Scores:
        """Runs B sequences through the layer loop.

        Args:
            ids_T: int64 token ids of all sequences, one after another, without padding.
            lengths_B: Tokens of each sequence, each in [1, context].
            observe: Is shown every stage call and its result.

        Returns:
            `Scores` of torch tensors.
        """
        sequences = Sequences(lengths_B)

        def answer(call: StageCall) -> Any:
            result = self._answer(call, sequences)
            if observe is not None:
                observe(call, result)
            return result

        return drive(layer_loop(self.spec.layers, self.spec.router.experts, ids_T, lengths_B), answer)

    def _answer(self, call: StageCall, sequences: Sequences) -> Any:
        match call:
            case Embed(ids_T=ids_T):
                return self.embedding(ids_T, sequences)
            case Gate(layer=layer, x_TD=x_TD):
                gated = self.gating[layer](x_TD, sequences)
                return replace(gated, expert_ids_TK=gated.expert_ids_TK.cpu())  # the dispatch is planned on the host
            case ApplyExperts(layer=layer, rows_ND=rows_ND):
                experts: Any = self.experts[layer]
                parts = torch.split(rows_ND, call.counts_E.tolist())
                return torch.cat([experts[expert](part) for expert, part in enumerate(parts) if len(part)])
            case Score(x_TD=x_TD):
                return self.classifier(x_TD, sequences)
