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

UNKNOWN_ID = 0


@dataclass(frozen=True)
class Batch:
    """B texts with their classes, without padding.

    Attributes:
        ids_T: int64 token ids, one text after another.
        lengths_B: Tokens of each text, at least 1.
        labels_B: Class of each text.
    """

    ids_T: Tensor
    lengths_B: Tensor
    labels_B: Tensor

    def to(self, device: torch.device) -> Batch:
        """Gives the batch on a device."""
        return Batch(self.ids_T.to(device), self.lengths_B.to(device), self.labels_B.to(device))

    def twice(self) -> Batch:
        """Gives every text twice: first all of them, then all again."""
        return Batch(self.ids_T.repeat(2), self.lengths_B.repeat(2), self.labels_B.repeat(2))


class TrainingBatches:
    """The batches of every epoch.

    Args:
        rows: Training rows.
        tokenizer: Cuts their texts.
        config: Context, batch size, seed, and what is dropped.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Tokenizer, config: TrainConfig) -> None:
        self._rows = rows
        self._tokenizer = tokenizer
        self._config = config
        self.steps_per_epoch = -(-len(rows) // config.train.batch_rows)

    def epoch(self, number: int) -> list[Batch]:
        """Gives epoch `number`, counted from 0."""
        train = self._config.train
        random = np.random.default_rng([train.seed, number])
        order = random.permutation(len(self._rows))
        bare = random.random(len(order)) < train.title_dropout
        rows = [self._rows[index] for index in order]
        texts = [row.description if drop else row.text for row, drop in zip(rows, bare, strict=True)]
        encoded = self._encode(texts, int(random.integers(1 << 31)))
        ids_T = np.where(random.random(len(encoded.ids_T)) < train.word_dropout, UNKNOWN_ID, encoded.ids_T)
        labels_B = np.array([row.label for row in rows], np.int64)
        return batched(ids_T, encoded.lengths_B, labels_B, train.batch_rows)

    def _encode(self, texts: Sequence[str], seed: int) -> Encoded:
        alpha, context = self._config.tokenizer.sampling_alpha, self._config.model.context
        if alpha > 0:
            return self._tokenizer.sample(texts, context, alpha, seed)
        return self._tokenizer.encode(texts, context)


def batched(
    ids_T: npt.NDArray[np.integer], lengths_B: npt.NDArray[np.integer], labels_B: npt.NDArray[np.integer], rows: int
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
        parts = (ids_T[start : ends_B[last - 1]], lengths_B[first:last], labels_B[first:last])
        batches.append(Batch(*(torch.from_numpy(np.array(part, np.int64)) for part in parts)))
    return batches
