"""How the token rows of B sequences lie one after another, and which of them are computed together.

Sequences are grouped by their own length rounded up to `LENGTH_MULTIPLE`. The group decides the padded shape
of attention and pooling, so the shape is a function of a sequence alone and never of its batch mates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from expertmesh.model.rotary import Rotary, Rotation

LENGTH_MULTIPLE = 16


@dataclass(frozen=True)
class Group:
    """N sequences of one padded length L.

    Attributes:
        members_N: Index of each sequence in the batch.
        lengths_N: Tokens of each sequence.
        rows_NL: Token row of each place; behind a sequence's end its last row is repeated.
        inside_NL: Whether a place holds a token.
    """

    members_N: Tensor
    lengths_N: Tensor
    rows_NL: Tensor
    inside_NL: Tensor

    @cached_property
    def inside_rows(self) -> Tensor:
        """The token rows of the group."""
        return self.rows_NL[self.inside_NL]

    @cached_property
    def inside_places(self) -> Tensor:
        """Which of N * L places hold these."""
        return torch.nonzero(self.inside_NL.flatten())[:, 0]


@dataclass(frozen=True)
class Pattern:
    """Which keys a layer's causal attention sees, and how.

    Attributes:
        layer: The layer.
        scale: Factor on the scores.
        window: How many of the latest tokens are seen; 0 for all.
        sinks_H: Each head's logit in the denominator, if there is one.
    """

    layer: int
    scale: float
    window: int = 0
    sinks_H: Tensor | None = None


class Sequences:
    """The layout of one batch of whole sequences.

    Args:
        lengths_B: Tokens of each sequence, each at least 1.
        rotary: Of models that have one.
    """

    def __init__(self, lengths_B: Tensor, rotary: Rotary | None = None) -> None:
        self.lengths_B = lengths_B.to(torch.int64)
        self.starts_B = torch.cumsum(self.lengths_B, 0) - self.lengths_B
        self._rotary = rotary

    @cached_property
    def rotation(self) -> Rotation:
        """What queries and keys are turned by."""
        assert self._rotary is not None
        return self._rotary.at(self.positions_T)

    def attend(self, q_THd: Tensor, k_TKd: Tensor, v_TKv: Tensor, pattern: Pattern) -> Tensor:
        """Causal attention for training: fast, differentiable, and not row-invariant; see `cache` for serving."""
        assert not pattern.window, "windows are not trained"
        assert pattern.sinks_H is None, "sinks are not trained"
        mixed_THv = q_THd.new_empty(*q_THd.shape[:2], v_TKv.shape[2])
        for group in self.groups:
            q, k, v = (x[group.rows_NL].transpose(1, 2) for x in (q_THd, k_TKd, v_TKv))
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=pattern.scale, enable_gqa=True)
            inside = mixed.transpose(1, 2)[group.inside_NL]
            mixed_THv = mixed_THv.index_put((group.inside_rows,), inside.to(mixed_THv.dtype))
        return mixed_THv

    @cached_property
    def positions_T(self) -> Tensor:
        """Position of each token row within its sequence."""
        total = int(self.lengths_B.sum())
        starts_T = torch.repeat_interleave(self.starts_B, self.lengths_B)
        return torch.arange(total, device=self.lengths_B.device) - starts_T

    @cached_property
    def groups(self) -> list[Group]:
        """The sequences by padded length, shortest first."""
        padded_B = (self.lengths_B + LENGTH_MULTIPLE - 1) // LENGTH_MULTIPLE * LENGTH_MULTIPLE
        return [
            self._group(torch.nonzero(padded_B == length)[:, 0], length) for length in sorted(set(padded_B.tolist()))
        ]

    def _group(self, members_N: Tensor, length: int) -> Group:
        lengths_N = self.lengths_B[members_N]
        places_L = torch.arange(length, device=members_N.device)
        inside_NL = places_L[None, :] < lengths_N[:, None]
        rows_NL = self.starts_B[members_N][:, None] + torch.minimum(places_L[None, :], lengths_N[:, None] - 1)
        return Group(members_N, lengths_N, rows_NL, inside_NL)
