"""What the training loop asks of a task; labelled rows and running texts answer it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from expertmesh.model.full import FullModel, Observer


class Movable(Protocol):
    """A batch."""

    def to(self, device: torch.device) -> Self:
        """Gives the batch on a device."""
        ...


BatchT = TypeVar("BatchT", bound=Movable)


@dataclass(frozen=True)
class StepLoss:
    """What one batch said.

    Attributes:
        loss: What is minimised, but for the router's losses.
        count: Of what the sums are, such as rows or tokens.
        sums: Figures over the batch, by name; "loss" is always there. The report has their means over an epoch.
    """

    loss: Tensor
    count: int
    sums: dict[str, float]


@dataclass(frozen=True)
class Judgement:
    """What a model made of the held-out data.

    Attributes:
        rank: The greater, the better.
        line: Its figures in the history of a run.
        heldout: Its figures in the report, if these weights stay the best.
    """

    rank: tuple[float, ...]
    line: dict[str, Any]
    heldout: dict[str, Any]


class Task(Protocol[BatchT]):
    """Data with what is to be learnt from them.

    Attributes:
        data: What the report says of the data.
        columns: Name and width of the task's own columns in the table of epochs.
        steps_per_epoch: Batches of an epoch.
        judge_every: Epochs between two judgements.
    """

    data: dict[str, Any]
    columns: dict[str, int]
    steps_per_epoch: int
    judge_every: int

    def start(self, model: FullModel) -> None:
        """Sets what the model starts from beyond random numbers."""
        ...

    def epoch(self, number: int) -> Sequence[BatchT]:
        """Gives the batches of epoch `number`, counted from 0: a function of the seed and the number alone."""
        ...

    def logits(self, model: FullModel, batch: BatchT, observe: Observer) -> Tensor:
        """Runs a model."""
        ...

    def loss(self, logits: Tensor, batch: BatchT) -> StepLoss:
        """Says how wrong it was."""
        ...

    def judge(self, model: FullModel) -> Judgement:
        """Has the held-out data judged, in the arithmetic that the model is served with."""
        ...

    def cells(self, line: dict[str, Any]) -> list[str]:
        """One cell for each of the columns."""
        ...
