"""What the routers of a forward pass decided."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expertmesh.dispatch import Gate, Gated, StageCall


class Routes:
    """Observes a forward pass and keeps what the router of every layer with experts decided."""

    def __init__(self) -> None:
        self.gated: dict[int, Gated] = {}

    def __call__(self, call: StageCall, result: Any) -> None:
        """Takes a stage call and its result (see `FullModel.forward`)."""
        if isinstance(call, Gate) and result.expert_ids_TK is not None:
            self.gated[call.layer] = result

    def counts_LE(self, experts: int) -> Tensor:
        """Rows that each expert of each layer with experts was given."""
        if not self.gated:
            return torch.zeros(0, experts, dtype=torch.int64)
        ids = [gated.expert_ids_TK.reshape(-1) for _, gated in sorted(self.gated.items())]
        return torch.stack([torch.bincount(layer_ids, minlength=experts) for layer_ids in ids]).cpu()


def shares(counts_LE: Any) -> list[list[float]]:
    """Share of a layer's rows that each expert was given; zero where there were none."""
    return [[float(count) / max(float(row.sum()), 1.0) for count in row] for row in counts_LE]
