"""Learning to classify labelled rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expertmesh.errors import SetupError
from expertmesh.model.full import FullModel, Observer
from expertmesh.tokenization.tokenizer import Tokenizer
from expertmesh.train import losses
from expertmesh.train.batches import Batch, TrainingBatches, batched, one_hot
from expertmesh.train.config import TrainConfig
from expertmesh.train.data import Split
from expertmesh.train.evaluation import evaluate
from expertmesh.train.task import Judgement, StepLoss
from expertmesh.train.vectors import token_vectors

EVALUATION_ROWS = 256


class Classification:
    """A `Task` of labelled rows.

    Args:
        config: What and how.
        split: Rows to learn from and to judge by.
        tokenizer: Its vocabulary must fit the model's.
    """

    def __init__(self, config: TrainConfig, split: Split, tokenizer: Tokenizer) -> None:
        if tokenizer.vocab > config.model.embedding.vocab:
            raise SetupError(f"the tokenizer has {tokenizer.vocab} pieces, the model {config.model.embedding.vocab}")
        self.columns = {"loss": 6, "right": 6, "held-out": 8, "right ": 8}
        self.judge_every = 1
        self._config, self._split, self._tokenizer = config, split, tokenizer
        self._batches = TrainingBatches(split.training, tokenizer, config)
        self._heldout = _heldout_batches(split, tokenizer, config)
        self.steps_per_epoch = self._batches.steps_per_epoch
        self.data = {
            "rows": {
                "training": len(split.training),
                "heldout": len(split.heldout),
                "duplicates_left_out": split.duplicates,
                "near_heldout_left_out": split.guarded,
            }
        }

    def start(self, model: FullModel) -> None:
        """Starts the token embeddings from who stands beside whom, if that is asked for."""
        train = self._config.train
        if train.cooccurrence_start:
            texts = [row.text for row in self._split.training]
            encoded = self._tokenizer.encode(texts, self._config.model.context)
            table = model.embedding.token.weight
            ids_T, lengths_B = torch.from_numpy(encoded.ids_T).long(), torch.from_numpy(encoded.lengths_B).long()
            table.data.copy_(token_vectors(ids_T, lengths_B, table.shape[0], table.shape[1], train.embedding_std))

    def epoch(self, number: int) -> list[Batch]:
        """Gives the batches of epoch `number`."""
        return self._batches.epoch(number)

    def logits(self, model: FullModel, batch: Batch, observe: Observer) -> Tensor:
        """Logits [B, C]."""
        return model(batch.ids_T, batch.lengths_B, observe=observe).logits_BC  # type: ignore[no-any-return]

    def loss(self, logits: Tensor, batch: Batch) -> StepLoss:
        """The smoothed cross entropy, and R-Drop's loss where it is asked for."""
        train, rows = self._config.train, len(batch.lengths_B)
        task = losses.smoothed_cross_entropy(logits, batch.targets_BC, train.label_smoothing)
        right = int((logits.argmax(dim=1) == batch.targets_BC.argmax(dim=1)).sum())
        loss = task
        if train.consistency_weight:
            loss = task + train.consistency_weight * losses.consistency_loss(*logits.chunk(2))
        return StepLoss(loss, rows, {"loss": task.item() * rows, "accuracy": right})

    def judge(self, model: FullModel) -> Judgement:
        """Ranks by accuracy, then loss."""
        judged = evaluate(model, self._heldout)
        heldout: dict[str, Any] = {
            "accuracy": judged.accuracy,
            "loss": judged.loss,
            "confusion": judged.confusion_CC(len(self._config.model.head.labels)),
            "expert_shares": judged.shares_LE,
        }
        line = {f"heldout_{name}": heldout[name] for name in ("loss", "accuracy", "expert_shares")}
        return Judgement((judged.accuracy, -judged.loss), line, heldout)

    def cells(self, line: dict[str, Any]) -> list[str]:
        """Loss and accuracy, in training and held out."""
        return [
            f"{line['loss']:.4f}",
            f"{100 * line['accuracy']:.2f}%",
            f"{line['heldout_loss']:.4f}",
            f"{100 * line['heldout_accuracy']:.2f}%" + (" *" if line["best"] else ""),
        ]


def _heldout_batches(split: Split, tokenizer: Tokenizer, config: TrainConfig) -> list[Batch]:
    encoded = tokenizer.encode([row.text for row in split.heldout], config.model.context)
    targets_BC = one_hot(split.heldout, len(config.model.head.labels))
    return batched(encoded.ids_T, encoded.lengths_B, targets_BC, EVALUATION_ROWS)
