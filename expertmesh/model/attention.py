"""The kinds of attention, each as the gating stage that has it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from expertmesh.model import invariant
from expertmesh.model.gating import GatingStage
from expertmesh.model.layers import NO_DROPOUT, Dropout, Joint, Linear, RMSNorm
from expertmesh.model.sequences import Pattern, Sequences
from expertmesh.model.spec import ModelSpec


class BidirectionalGating(GatingStage):
    """Every token sees the whole sequence; nothing is cached."""

    def __init__(self, spec: ModelSpec, layer: int = 0, dropout: Dropout = NO_DROPOUT) -> None:
        super().__init__(spec, layer, dropout)
        self.heads = spec.attention.heads
        self.qkv = Linear(spec.width, 3 * spec.width)
        self.out = Linear(spec.width, spec.width)

    def attention(self, x_TD: Tensor, sequences: Sequences) -> Tensor:
        """What attention adds to the residual stream."""
        rows, width = x_TD.shape
        qkv = self.qkv(x_TD)
        attended_TD = torch.empty_like(qkv[:, :width])
        for group in sequences.groups:
            n, length = group.rows_NL.shape
            padded = qkv.index_select(0, group.rows_NL.flatten())
            q, k, v = padded.view(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
            mixed = invariant.bidirectional_attention(q, k, v, group.lengths_N)
            flat = mixed.transpose(1, 2).reshape(n * length, width)
            attended_TD.index_copy_(0, group.inside_rows, flat.index_select(0, group.inside_places))
        return self.out(attended_TD)  # type: ignore[no-any-return]


class GroupedGating(GatingStage):
    """Causal attention whose key heads are shared by groups of query heads."""

    sinks: Tensor | None

    def __init__(self, spec: ModelSpec, layer: int = 0, dropout: Dropout = NO_DROPOUT) -> None:
        super().__init__(spec, layer, dropout)
        attention = spec.attention
        self.heads, self.key_heads, self.head_width = attention.heads, attention.kv_heads, attention.head_width
        width, key_width = self.heads * self.head_width, self.key_heads * self.head_width
        self.q = Linear(spec.width, width, bias=attention.qkv_bias)
        self.k = Linear(spec.width, key_width, bias=attention.qkv_bias)
        self.v = Linear(spec.width, key_width, bias=attention.qkv_bias)
        self.qkv = Joint(self.q, self.k, self.v)
        self.out = Linear(width, spec.width, bias=attention.out_bias)
        self.flat_norm = attention.qk_norm == "flat"
        if attention.qk_norm != "none":
            self.q_norm = RMSNorm(width if self.flat_norm else self.head_width, spec.norm.eps)
            self.k_norm = RMSNorm(key_width if self.flat_norm else self.head_width, spec.norm.eps)
        self.has_norm = attention.qk_norm != "none"
        self.register_parameter("sinks", nn.Parameter(torch.zeros(self.heads)) if attention.sinks else None)
        self.clip = attention.clip
        self.scale = attention.scale or self.head_width**-0.5
        self.window = attention.window(layer)

    def attention(self, x_TD: Tensor, sequences: Sequences) -> Tensor:
        """What attention adds to the residual stream."""
        q, k, v = self.qkv(x_TD)
        if self.has_norm and self.flat_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.clip:
            q, k, v = (part.clamp(-self.clip, self.clip) for part in (q, k, v))
        q_THd, k_TKd, v_TKd = (part.view(len(part), -1, self.head_width) for part in (q, k, v))
        if self.has_norm and not self.flat_norm:
            q_THd, k_TKd = self.q_norm(q_THd), self.k_norm(k_TKd)
        turn = sequences.rotation.turn
        pattern = Pattern(self.layer, self.scale, self.window, self.sinks)
        mixed_THd = sequences.attend(turn(q_THd), turn(k_TKd), v_TKd, pattern)
        return self.out(mixed_THd.flatten(1).to(self.dtype))  # type: ignore[no-any-return]


class LatentGating(GatingStage):
    """Causal attention on one latent row a token, which is both key and value of every head.

    Keys and values are not expanded: what would expand a key is applied to the query, what would expand a value to the
    result (DeepSeek-AI, "DeepSeek-V2", 2024, section 2.1.2), so that only the latent rows are cached.
    """

    def __init__(self, spec: ModelSpec, layer: int = 0, dropout: Dropout = NO_DROPOUT) -> None:
        super().__init__(spec, layer, dropout)
        attention = spec.attention
        self.heads, self.head_width, self.value_width = attention.heads, attention.head_width, attention.value_width
        self.rank = attention.latent_rank
        self.turned_width = 2 * len(spec.rotary.frequencies)
        query_width = self.heads * (self.head_width + self.turned_width)
        self.query_rank = attention.query_rank
        if self.query_rank:
            self.q_down = Linear(spec.width, self.query_rank, bias=False)
            self.q_down_norm = RMSNorm(self.query_rank, attention.latent_eps)
            self.q_up = Linear(self.query_rank, query_width, bias=False)
        else:
            self.q = Linear(spec.width, query_width, bias=False)
        self.kv_down = Linear(spec.width, self.rank + self.turned_width, bias=False)
        self.latent_norm = RMSNorm(self.rank, attention.latent_eps)
        self.kv_up = Linear(self.rank, self.heads * (self.head_width + self.value_width), bias=False)
        self.kv_up.is_used_as_it_is = True
        self.out = Linear(self.heads * self.value_width, spec.width, bias=False)
        self.scale = attention.scale or (self.head_width + self.turned_width) ** -0.5
        self.window = attention.window(layer)

    def attention(self, x_TD: Tensor, sequences: Sequences) -> Tensor:
        """What attention adds to the residual stream."""
        q = self.q_up(self.q_down_norm(self.q_down(x_TD)).to(self.dtype)) if self.query_rank else self.q(x_TD)
        q_THd = q.unflatten(1, (self.heads, -1))
        latent_Tr, turned_TR = self.kv_down(x_TD).split([self.rank, self.turned_width], dim=-1)
        latent_T1r = self.latent_norm(latent_Tr)[:, None]
        turn = sequences.rotation.turn
        expansion = self.kv_up.weight.view(self.heads, -1, self.rank)
        keys_Hnr, values_Hvr = expansion[:, : self.head_width], expansion[:, self.head_width :]
        q_THr = _by_head(q_THd[..., : self.head_width], keys_Hnr)
        q_THd = torch.cat([q_THr.float(), turn(q_THd[..., self.head_width :])], dim=-1)
        k_T1d = torch.cat([latent_T1r, turn(turned_TR[:, None])], dim=-1)
        mixed_THr = sequences.attend(q_THd, k_T1d, latent_T1r, Pattern(self.layer, self.scale, self.window))
        mixed_THv = _by_head(mixed_THr.to(self.dtype), values_Hvr.transpose(1, 2))
        return self.out(mixed_THv.flatten(1))  # type: ignore[no-any-return]


def _by_head(x_THi: Tensor, weight_Hio: Tensor) -> Tensor:
    """Multiplies the rows of each head with a matrix of its own: [T, H, i] and [H, i, o] give [T, H, o]."""
    products = [
        invariant.linear(x_THi[:, head], weight_io.transpose(0, 1)) for head, weight_io in enumerate(weight_Hio)
    ]
    return torch.stack(products, dim=1)


_KINDS = {"bidirectional": BidirectionalGating, "grouped": GroupedGating, "latent": LatentGating}


def gating_stage(spec: ModelSpec, layer: int, dropout: Dropout = NO_DROPOUT) -> GatingStage:
    """One layer's gating, as the spec asks for."""
    return _KINDS[spec.attention.kind](spec, layer, dropout)
