"""Gating: one layer's norms, attention and router, and what every token uses, shared experts and dense layers.

The residual stream is in float32 throughout; matrices are multiplied in the model's dtype.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from expertmesh.dispatch import Gated, add
from expertmesh.model import invariant
from expertmesh.model.cache import KeyValueCache
from expertmesh.model.cached_sequences import CachedSequences
from expertmesh.model.decoding import TokenStep
from expertmesh.model.graphs import Graphs
from expertmesh.model.layers import DTYPES, NO_DROPOUT, Dropout, GatedMLP, Linear, norm
from expertmesh.model.rotary import Rotary
from expertmesh.model.router import route
from expertmesh.model.sequences import Sequences
from expertmesh.model.spec import ModelSpec


class GatingStage(nn.Module):
    """One layer up to its experts: rows to the residual stream, the experts' input and the routes.

    Its subclasses in `attention` differ in their attention, whose layers are the stage's own.

    Args:
        spec: The model.
        layer: Which layer this is.
        dropout: Of training.
    """

    selection_bias: Tensor | None

    def __init__(self, spec: ModelSpec, layer: int = 0, dropout: Dropout = NO_DROPOUT) -> None:
        super().__init__()
        self.layer = layer
        self.graphs: Graphs | None = None
        self.router_spec = spec.router
        self.residual_multiplier = spec.residual_multiplier
        self.dtype = DTYPES[spec.dtype]
        self.attention_norm = norm(spec.width, spec.norm)
        self.expert_norm = norm(spec.width, spec.norm)
        dense = spec.dense
        self.is_sparse = layer not in dense.layers
        self.has_shared = self.is_sparse and dense.shared_width > 0
        self.has_shared_gate = self.is_sparse and dense.shared_gate
        if self.is_sparse:
            self.router = Linear(spec.width, spec.router.experts, bias=spec.router.bias)
            bias_E = nn.Parameter(torch.zeros(spec.router.experts)) if spec.router.selection_bias else None
            self.register_parameter("selection_bias", bias_E)
        else:
            self.dense = GatedMLP(spec.width, replace(spec.expert, width=dense.width, bias=False))
        if self.has_shared:
            self.shared = GatedMLP(spec.width, replace(spec.expert, width=dense.shared_width, bias=False))
        if self.has_shared_gate:
            self.shared_gate = Linear(spec.width, 1, bias=False)
        self.dropout = nn.Dropout(dropout.attention)

    def forward(self, x_TD: Tensor, sequences: Sequences, shared_apart: bool = False) -> Gated:
        """x_TD to a `Gated`: in a sparse layer with int64 expert ids and fp32 weights, else the new x_TD alone.

        Args:
            x_TD: The residual stream.
            sequences: How its rows lie.
            shared_apart: Whether what the shared experts add is left out; see `share`.
        """
        apart = shared_apart and self.has_shared
        given: tuple[Tensor, ...]
        if self.graphs is None:
            given = self._gate(x_TD, sequences, apart)
        elif isinstance(sequences, CachedSequences) and (table_TI := sequences.token_table(self.layer)) is not None:
            fixed = (sequences.cache, sequences.rotary, apart)
            given = self.graphs.run(self._gate_tokens, x_TD, table_TI, fixed=fixed)
        else:
            given = self.graphs.run(self._behind_attention, self._attended(x_TD, sequences), fixed=(apart,))
        if not self.is_sparse:
            return Gated(given[0])
        residual_TD, expert_input_TD, ids_TK, weights_TK = given
        return Gated(residual_TD, expert_input_TD, ids_TK, weights_TK, apart)

    def share(self, expert_input_TD: Tensor) -> Tensor:
        """What the shared experts add to the residual stream but for its multiplier, in float32."""
        shared_TD: Tensor = self.shared(expert_input_TD).float()
        if self.has_shared_gate:
            shared_TD = shared_TD * invariant.sigmoid(self.shared_gate(expert_input_TD).float())
        return shared_TD

    def attend(self, x_TD: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
        """The residual stream after attention, and its norm, which router and experts see, both in float32."""
        residual_TD = self._attended(x_TD, sequences)
        return residual_TD, self.expert_norm(residual_TD)

    def _attended(self, x_TD: Tensor, sequences: Sequences) -> Tensor:
        attended_TD = self.attention(self.attention_norm(x_TD).to(self.dtype), sequences)
        return self._added(x_TD, self.dropout(attended_TD) if self.training else attended_TD)

    def _gate(self, x_TD: Tensor, sequences: Sequences, apart: bool) -> tuple[Tensor, ...]:
        return self._behind_attention(self._attended(x_TD, sequences), apart)

    def _gate_tokens(
        self, x_TD: Tensor, table_TI: Tensor, cache: KeyValueCache, rotary: Rotary, apart: bool
    ) -> tuple[Tensor, ...]:
        return self._gate(x_TD, TokenStep(table_TI, cache, rotary), apart)

    def _behind_attention(self, residual_TD: Tensor, apart: bool) -> tuple[Tensor, ...]:
        """What `forward` gives, of the residual stream after attention: a function of each row."""
        normed_TD = self.expert_norm(residual_TD)
        expert_input_TD = normed_TD.to(self.dtype)
        if not self.is_sparse:
            return (self._added(residual_TD, self.dense(expert_input_TD)),)
        ids_TK, weights_TK = self.route(self.router_logits(normed_TD))
        if self.has_shared and not apart:
            residual_TD = self._added(residual_TD, self.share(expert_input_TD))
        return residual_TD, expert_input_TD, ids_TK, weights_TK

    def attention(self, x_TD: Tensor, sequences: Sequences) -> Tensor:
        """What attention adds to the residual stream."""
        raise NotImplementedError

    def router_logits(self, expert_input_TD: Tensor) -> Tensor:
        """The router's score of each expert, [T, E] in fp32."""
        with torch.autocast(expert_input_TD.device.type, enabled=False):
            return self.router(expert_input_TD.float())  # type: ignore[no-any-return]

    def route(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """The best K experts of each row, ascending by expert, and their weights."""
        return route(logits_TE, self.router_spec, self.selection_bias)

    def _added(self, residual_TD: Tensor, more_TD: Tensor) -> Tensor:
        added_TD: Tensor = add(residual_TD, more_TD.float(), self.residual_multiplier)
        return added_TD
