"""How the token rows of B sequences lie one after another, and which of them are computed together.

Sequences are grouped by their own length rounded up to `LENGTH_MULTIPLE`. The group decides the padded shape
of attention and pooling, so the shape is a function of a sequence alone and never of its batch mates.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

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


class Sequences:
    """The layout of one batch.

    Args:
        lengths_B: Tokens of each sequence, each at least 1.
    """

    def __init__(self, lengths_B: Tensor) -> None:
        self.lengths_B = lengths_B.to(torch.int64)
        self.starts_B = torch.cumsum(self.lengths_B, 0) - self.lengths_B

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
