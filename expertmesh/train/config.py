"""The settings of one training run, read from TOML and checked before anything starts.

The model's head says what is learnt: `kind = "language"` trains on texts, everything else on labelled rows.
"""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expertmesh.errors import SetupError
from expertmesh.model.layers import Dropout
from expertmesh.model.spec import ModelSpec
from expertmesh.train.settings import TextSettings, TokenizerConfig, TrainSettings, read_table, require

_ONLY_CLASSIFIERS = (
    "cooccurrence_start",
    "word_dropout",
    "title_dropout",
    "label_smoothing",
    "teacher_weight",
    "consistency_weight",
)


@dataclass(frozen=True)
class TrainConfig:
    """A whole configuration: what is trained, on which pieces, and how."""

    model: ModelSpec
    tokenizer: TokenizerConfig = TokenizerConfig()
    train: TrainSettings = TrainSettings()
    texts: TextSettings = TextSettings()

    def __post_init__(self) -> None:
        attention = self.model.attention
        require(bool(self.model.sparse_layers), "model.dense.layers must leave a layer that has experts")
        require(not any(attention.windows), "model.attention.windows is for imported models, not for training")
        require(not attention.sinks, "model.attention.sinks is for imported models, not for training")
        require(self.model.dtype == "float32", "model.dtype must be 'float32'; see train.autocast")
        if not self.model.generates:
            require(self.texts == TextSettings(), "[texts] is for a language model, which has head.kind = 'language'")
            return
        for name in _ONLY_CLASSIFIERS:
            require(not getattr(self.train, name), f"train.{name} is for classifiers; a language model has none")
        require(self.texts.window <= self.model.context, "texts.window must not be more than model.context")
        require(self.tokenizer.sampling_alpha < 1, "tokenizer.sampling_alpha must be below 1 for a language model")
        require(len(self.model.head.end_ids) == 1, "model.head.end_ids needs one token, which stands between texts")

    @property
    def window(self) -> int:
        """Tokens of a language model's training window."""
        return self.texts.window or self.model.context

    def to_dict(self) -> dict[str, Any]:
        """Gives plain values for JSON; `from_dict` reads them back."""
        tokenizer = {**asdict(self.tokenizer), "steps": list(self.tokenizer.steps)}
        tables = {"model": self.model.to_dict(), "tokenizer": tokenizer, "train": asdict(self.train)}
        return tables | ({"texts": asdict(self.texts)} if self.model.generates else {})

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Reads plain values.

        Raises:
            SetupError: A key is missing, unknown, or has a bad value.
        """
        unknown = sorted(set(values) - {"model", "tokenizer", "train", "texts"})
        require(not unknown and "model" in values, f"needs [model]; knows no {', '.join(unknown) or 'other table'}")
        train = values.get("train", {})
        if isinstance(train, dict) and "dropout" in train:
            train = {**train, "dropout": read_table(Dropout, train["dropout"], "train.dropout")}
        return cls(
            ModelSpec.from_dict(values["model"]),
            read_table(TokenizerConfig, values.get("tokenizer", {}), "tokenizer"),
            read_table(TrainSettings, train, "train"),
            read_table(TextSettings, values.get("texts", {}), "texts"),
        )

    @classmethod
    def load(cls, path: Path) -> TrainConfig:
        """Reads a TOML file.

        Raises:
            SetupError: It cannot be read, is no TOML, or has a bad value.
        """
        try:
            with path.open("rb") as file:
                return cls.from_dict(tomllib.load(file))
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SetupError(f"{path}: cannot be read ({error})") from None
