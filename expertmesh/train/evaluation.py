"""How good a classifier is on texts it has not seen, and how evenly it uses its experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from expertmesh.model.full import FullModel
from expertmesh.train.batches import Batch
from expertmesh.train.routes import Routes, shares


@dataclass(frozen=True)
class Evaluation:
    """What a model made of B texts.

    Attributes:
        predicted_B: Most probable class of each text.
        labels_B: True class of each text.
        counts_LE: Rows that each expert of each layer was given.
        loss: Mean cross entropy, without smoothing.
    """

    predicted_B: np.ndarray[Any, np.dtype[np.int64]]
    labels_B: np.ndarray[Any, np.dtype[np.int64]]
    counts_LE: np.ndarray[Any, np.dtype[np.int64]]
    loss: float

    @property
    def accuracy(self) -> float:
        """Share of texts whose class was found."""
        return float((self.predicted_B == self.labels_B).mean())

    def confusion_CC(self, classes: int) -> list[list[int]]:
        """How many texts of each true class (row) were given each class (column)."""
        pairs = self.labels_B * classes + self.predicted_B
        return [list(map(int, row)) for row in np.bincount(pairs, minlength=classes**2).reshape(classes, classes)]

    @property
    def shares_LE(self) -> list[list[float]]:
        """Share of a layer's rows that each expert was given."""
        return shares(self.counts_LE)


def evaluate(model: FullModel, batches: Sequence[Batch]) -> Evaluation:
    """Runs a model over batches, in the arithmetic that it is served with: no dropout, no autocast."""
    device = next(model.parameters()).device
    routes, losses = Routes(), []
    predicted, counts_LE = [], torch.zeros(model.spec.layers, model.spec.router.experts, dtype=torch.int64)
    model.eval()
    with torch.inference_mode():
        for batch in (batch.to(device) for batch in batches):
            scores = model(batch.ids_T, batch.lengths_B, observe=routes)
            predicted.append(scores.logits_BC.argmax(dim=1).cpu())
            losses.append(torch.nn.functional.cross_entropy(scores.logits_BC, batch.targets_BC, reduction="none").cpu())
            counts_LE += routes.counts_LE(model.spec.router.experts)
    return Evaluation(
        predicted_B=torch.cat(predicted).numpy(),
        labels_B=torch.cat([batch.targets_BC.argmax(dim=1) for batch in batches]).numpy(),
        counts_LE=counts_LE.numpy(),
        loss=float(torch.cat(losses).mean()),
    )
