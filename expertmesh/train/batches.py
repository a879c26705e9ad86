"""Training texts as batches of token ids: shuffled, cut and thinned out anew in every epoch.

What epoch n looks like is a function of the seed and n alone, so a resumed run sees what the first would have seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertmesh.tokenization.tokenizer import Encoded, Tokenizer
from expertmesh.train.config import TrainConfig
from expertmesh.train.data import Row
from expertmesh.train.teacher import cross_fitted

UNKNOWN_ID = 0


@dataclass(frozen=True)
class Batch:
    """B texts with their targets, without padding.

    Attributes:
        ids_T: int64 token ids, one text after another.
        lengths_B: Tokens of each text, at least 1.
        targets_BC: Share of each class in what is to be said of each text; rows sum to 1.
    """

    ids_T: Tensor
    lengths_B: Tensor
    targets_BC: Tensor

    def to(self, device: torch.device) -> Batch:
        """Gives the batch on a device."""
        return Batch(self.ids_T.to(device), self.lengths_B.to(device), self.targets_BC.to(device))

    def followed_by(self, other: Batch) -> Batch:
        """Gives the texts of both, this one's first."""
        pairs = ((self.ids_T, other.ids_T), (self.lengths_B, other.lengths_B), (self.targets_BC, other.targets_BC))
        return Batch(*(torch.cat(pair) for pair in pairs))


class TrainingBatches:
    """The batches of every epoch.

    Args:
        rows: Training rows.
        tokenizer: Cuts their texts.
        config: Context, batch size, seed, what is dropped, and whether a batch holds two views of every text.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Tokenizer, config: TrainConfig) -> None:
        self._rows = rows
        self._tokenizer = tokenizer
        self._config = config
        self._targets_BC = _targets(rows, tokenizer, config)
        self.steps_per_epoch = -(-len(rows) // config.train.batch_rows)

    def epoch(self, number: int) -> list[Batch]:
        """Gives epoch `number`, counted from 0.

        With a consistency loss every batch holds its texts twice, one view after the other, each view segmented and
        thinned out by itself.
        """
        train = self._config.train
        random = np.random.default_rng([train.seed, number])
        order = random.permutation(len(self._rows))
        batches = self._view(order, random)
        if train.consistency_weight:
            batches = [
                first.followed_by(second) for first, second in zip(batches, self._view(order, random), strict=True)
            ]
        return batches

    def _view(self, order: npt.NDArray[np.int64], random: np.random.Generator) -> list[Batch]:
        train = self._config.train
        bare = random.random(len(order)) < train.title_dropout
        rows = [self._rows[index] for index in order]
        texts = [row.description if drop else row.text for row, drop in zip(rows, bare, strict=True)]
        encoded = self._encode(texts, int(random.integers(1 << 31)))
        ids_T, lengths_B = thinned_out(encoded, random.random(len(encoded.ids_T)) >= train.word_dropout)
        return batched(ids_T, lengths_B, self._targets_BC[torch.from_numpy(order)], train.batch_rows)

    def _encode(self, texts: Sequence[str], seed: int) -> Encoded:
        alpha, context = self._config.tokenizer.sampling_alpha, self._config.model.context
        if alpha > 0:
            return self._tokenizer.sample(texts, context, alpha, seed)
        return self._tokenizer.encode(texts, context)


def thinned_out(encoded: Encoded, kept_T: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Takes tokens out of texts, and gives the ids that are left and how many of each text.

    They are not replaced by the unknown token: a router would reserve an expert for it, which then idles in service.
    """
    ends_B = np.cumsum(encoded.lengths_B)
    kept_before = np.concatenate([[0], np.cumsum(kept_T)])
    return encoded.ids_T[kept_T], kept_before[ends_B] - kept_before[ends_B - encoded.lengths_B]


def one_hot(rows: Sequence[Row], classes: int) -> Tensor:
    """The labels as targets [B, C]."""
    return torch.eye(classes)[[row.label for row in rows]]


def _targets(rows: Sequence[Row], tokenizer: Tokenizer, config: TrainConfig) -> Tensor:
    classes, weight = len(config.model.head.labels), config.train.teacher_weight
    labels_BC = one_hot(rows, classes)
    if not weight:
        return labels_BC
    texts = [tokenizer.normalizer(row.text) for row in rows]
    return torch.lerp(labels_BC, cross_fitted(texts, labels_BC.argmax(dim=1), classes, config.train.seed), weight)


def batched(
    ids_T: npt.NDArray[np.integer], lengths_B: npt.NDArray[np.integer], targets_BC: Tensor, rows: int
) -> list[Batch]:
    """Cuts texts into batches of at most `rows`; a text without a token becomes one unknown token."""
    ends_B = np.cumsum(lengths_B)
    if (lengths_B == 0).any():
        ids_T = np.insert(ids_T, ends_B[lengths_B == 0], UNKNOWN_ID)
        lengths_B = np.maximum(lengths_B, 1)
        ends_B = np.cumsum(lengths_B)
    batches = []
    for first in range(0, len(lengths_B), rows):
        last = min(first + rows, len(lengths_B))
        start = ends_B[first] - lengths_B[first]
        parts = (ids_T[start : ends_B[last - 1]], lengths_B[first:last])
        ids, lengths = (torch.from_numpy(np.array(part, np.int64)) for part in parts)
        batches.append(Batch(ids, lengths, targets_BC[first:last]))
    return batches
