"""Learning to say the next token of running texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from expertmesh.errors import SetupError
from expertmesh.model.full import FullModel, Observer
from expertmesh.train import losses
from expertmesh.train.config import TrainConfig
from expertmesh.train.likelihood import TextIds, measure
from expertmesh.train.pieces import Pieces
from expertmesh.train.task import Judgement, StepLoss
from expertmesh.train.texts import Texts


@dataclass(frozen=True)
class Windows:
    """B stretches of text, each `length` tokens, with the token that follows each token.

    Attributes:
        ids_T: int64 token ids, one window after another.
        lengths_B: Tokens of each window, all the same.
        targets_T: int64 ids of the tokens that follow.
    """

    ids_T: Tensor
    lengths_B: Tensor
    targets_T: Tensor

    def to(self, device: torch.device) -> Windows:
        """Gives the batch on a device."""
        return Windows(self.ids_T.to(device), self.lengths_B.to(device), self.targets_T.to(device))


class Language:
    """A `Task` of running texts. An epoch has as many windows as the main text fills; where they start is drawn.

    Args:
        config: What and how.
        texts: What is learnt from and judged by.
        pieces: Its vocabulary must fit the model's.
    """

    def __init__(self, config: TrainConfig, texts: Texts, pieces: Pieces) -> None:
        if pieces.vocab != config.model.embedding.vocab:
            raise SetupError(f"the tokenizer has {pieces.vocab} pieces, the model {config.model.embedding.vocab}")
        self.columns = {"loss": 6, "held-out": 8, "nats/char": 9}
        self._config, self._texts, self._pieces = config, texts, pieces
        self._end_id = config.model.head.end_ids[0]
        self._main_T = self._stream(pieces.encode(texts.main))
        self._others_T = self._stream(*map(pieces.encode, texts.others))
        self._heldout = TextIds(self._stream(pieces.encode(texts.heldout)), len(texts.heldout))
        self.judge_every = config.texts.judge_every
        self.steps_per_epoch = -(-len(self._main_T) // (config.window * config.train.batch_rows))
        for name, stream_T in (("first", self._main_T), ("other", self._others_T)):
            if len(stream_T) <= config.window and (name == "first" or self._takes_others):
                raise SetupError(f"the {name} text has {len(stream_T)} tokens, too few for a window of {config.window}")
        self.data = {
            "tokens": {
                "training": len(self._main_T),
                "others": len(self._others_T),
                "heldout": len(self._heldout.stream_T) - 1,
            },
            "characters": {"training": len(texts.main), "heldout": len(texts.heldout)},
        }

    def start(self, model: FullModel) -> None:
        """Has nothing to add to random numbers."""

    def epoch(self, number: int) -> list[Windows]:
        """Gives the batches of epoch `number`."""
        config = self._config
        random = np.random.default_rng([config.train.seed, number])
        main_T = self._main_T
        if config.tokenizer.sampling_alpha:
            seed = int(random.integers(1 << 31))
            main_T = self._stream(self._pieces.sample(self._texts.main, config.tokenizer.sampling_alpha, seed))
        return [self._batch(main_T, self._share_of_others(number), random) for _ in range(self.steps_per_epoch)]

    def logits(self, model: FullModel, batch: Windows, observe: Observer) -> Tensor:
        """Logits [T, V]."""
        return model.logits(batch.ids_T, batch.lengths_B, observe)

    def loss(self, logits: Tensor, batch: Windows) -> StepLoss:
        """The cross entropy of every next token."""
        loss, tokens = losses.smoothed_cross_entropy(logits.float(), batch.targets_T, 0.0), len(batch.targets_T)
        return StepLoss(loss, tokens, {"loss": loss.item() * tokens})

    def judge(self, model: FullModel) -> Judgement:
        """Ranks by nats per character."""
        window = self._config.window
        measured = measure(model, self._heldout, window, window // 2)
        heldout: dict[str, Any] = {
            "nats_per_token": measured.nats / measured.tokens,
            "nats_per_character": measured.nats / self._heldout.characters,
            "expert_shares": measured.shares_LE,
        }
        line = {f"heldout_{name}": value for name, value in heldout.items()}
        return Judgement((-heldout["nats_per_character"],), line, heldout)

    def cells(self, line: dict[str, Any]) -> list[str]:
        """Nats per token, in training and held out, and nats per held-out character."""
        return [
            f"{line['loss']:.4f}",
            f"{line['heldout_nats_per_token']:.4f}",
            f"{line['heldout_nats_per_character']:.4f}" + (" *" if line["best"] else ""),
        ]

    @property
    def _takes_others(self) -> bool:
        return bool(self._texts.others) and self._config.texts.others_share > 0

    def _stream(self, *texts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Texts one after another, the end token before each of them."""
        return np.concatenate([np.zeros(0, np.int64), *(np.insert(ids_T, 0, self._end_id) for ids_T in texts)])

    def _share_of_others(self, epoch: int) -> float:
        if not self._takes_others:
            return 0.0
        left = self._config.train.epochs - epoch
        return self._config.texts.others_share if left > self._config.texts.last_epochs else 0.0

    def _batch(self, main_T: npt.NDArray[np.int64], others_share: float, random: np.random.Generator) -> Windows:
        window, count = self._config.window, self._config.train.batch_rows
        others = int(random.binomial(count, others_share))
        streams = [self._others_T] * others + [main_T] * (count - others)
        starts = [int(random.integers(len(stream_T) - window)) for stream_T in streams]
        cut = [stream_T[start : start + window + 1] for stream_T, start in zip(streams, starts, strict=True)]
        windows_BL = torch.from_numpy(np.stack(cut))
        lengths_B = torch.full((count,), window)
        return Windows(windows_BL[:, :-1].reshape(-1), lengths_B, windows_BL[:, 1:].reshape(-1))
