"""The settings of one training run, read from TOML and checked before anything starts."""

from __future__ import annotations

import tomllib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from expertmesh.errors import SetupError
from expertmesh.model.spec import ModelSpec
from expertmesh.model.layers import NO_DROPOUT, Dropout
from expertmesh.tokenization.normalizer import NEWS_STEPS, STEPS

T = TypeVar("T")
STORAGE_DTYPES = ("float32", "float16", "bfloat16")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise SetupError(f"training configuration: {message}")


def _read(cls: type[T], values: Any, where: str) -> T:
    _require(isinstance(values, dict), f"{where} must be a table")
    types = {field.name: type(field.default) for field in fields(cls)}  # type: ignore[arg-type]
    plain = {}
    for name, value in values.items():
        _require(name in types, f"{where}.{name} is not known")
        plain[name] = tuple(value) if isinstance(value, list) else value
        if types[name] is float and type(value) is int:
            plain[name] = float(value)
        _require(type(plain[name]) is types[name], f"{where}.{name} must be of type {types[name].__name__}")
    return cls(**plain)


@dataclass(frozen=True)
class TokenizerConfig:
    """How the vocabulary is made and used in training; its size is `model.embedding.vocab`.

    Attributes:
        steps: Normaliser steps, in order.
        character_coverage: Share of the characters of the training text that get a piece of their own.
        sampling_alpha: Sharpness of subword regularisation; 0 always takes the best segmentation.
    """

    steps: tuple[str, ...] = NEWS_STEPS
    character_coverage: float = 0.9999
    sampling_alpha: float = 0.0

    def __post_init__(self) -> None:
        _require(all(step in STEPS for step in self.steps), f"tokenizer.steps must be among {', '.join(STEPS)}")
        _require(0 < self.character_coverage <= 1, "tokenizer.character_coverage must be in (0, 1]")
        _require(self.sampling_alpha >= 0, "tokenizer.sampling_alpha must not be negative")


@dataclass(frozen=True)
class TrainSettings:
    """The optimisation.

    Attributes:
        batch_rows: Texts per step.
        learning_rate: Peak of the schedule: linear warm-up, then a cosine down to `final_rate` of the peak.
        weight_decay: Of matrices; norms and biases have none, embedding tables `embedding_weight_decay`.
        embedding_std: Standard deviation of the token embeddings at the start.
        cooccurrence_start: Whether they start from who stands beside whom (see `vectors`), not from random numbers.
        embedding_rate: Learning rate of embedding tables, as a share of the others'.
        bigram_std: The same for hashed bigrams and positions.
        word_dropout: Share of tokens left out.
        title_dropout: Share of titles left out.
        label_smoothing: Share of a target spread over all classes.
        teacher_weight: Share of a target that is a cross-fitted linear model's opinion (see `teacher`); 0 asks none.
        balance_weight: Weight of the load-balancing loss, mean over layers.
        router_z_weight: Weight of the router z-loss, mean over layers.
        consistency_weight: Weight of the R-Drop loss; above 0 a batch holds every text twice.
        ema_decay: Decay per step of the averaged weights, which are what is judged and stored; 0 averages nothing.
        autocast: "bfloat16" or "none".
        storage_dtype: Of model.safetensors.
        device: "cpu" or "cuda".
        threads: Of torch on the CPU; 0 leaves torch its default.
        save_every_steps: Steps between resume states besides those after each epoch; 0 writes none.
    """

    epochs: int = 10
    seed: int = 0
    batch_rows: int = 128
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    final_rate: float = 0.02
    weight_decay: float = 0.05
    embedding_weight_decay: float = 0.05
    clip_norm: float = 1.0
    embedding_std: float = 0.1
    cooccurrence_start: bool = False
    embedding_rate: float = 1.0
    bigram_std: float = 0.02
    dropout: Dropout = NO_DROPOUT
    word_dropout: float = 0.0
    title_dropout: float = 0.0
    label_smoothing: float = 0.0
    teacher_weight: float = 0.0
    balance_weight: float = 0.01
    router_z_weight: float = 0.001
    consistency_weight: float = 0.0
    ema_decay: float = 0.998
    autocast: str = "none"
    storage_dtype: str = "float32"
    device: str = "cpu"
    threads: int = 0
    save_every_steps: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_rows", "learning_rate", "clip_norm", "embedding_std", "bigram_std"):
            _require(getattr(self, name) > 0, f"train.{name} must be positive")
        _require(0 < self.embedding_rate <= 1, "train.embedding_rate must be in (0, 1]")
        for name in ("seed", "warmup_steps", "threads", "save_every_steps", "weight_decay", "embedding_weight_decay"):
            _require(getattr(self, name) >= 0, f"train.{name} must not be negative")
        for name in ("balance_weight", "router_z_weight", "consistency_weight"):
            _require(getattr(self, name) >= 0, f"train.{name} must not be negative")
        for name in ("final_rate", "word_dropout", "title_dropout", "label_smoothing", "teacher_weight", "ema_decay"):
            _require(0 <= getattr(self, name) < 1, f"train.{name} must be in [0, 1)")
        for name, rate in asdict(self.dropout).items():
            _require(0 <= rate < 1, f"train.dropout.{name} must be in [0, 1)")
        _require(self.autocast in ("none", "bfloat16"), "train.autocast must be 'none' or 'bfloat16'")
        _require(self.storage_dtype in STORAGE_DTYPES, f"train.storage_dtype must be among {', '.join(STORAGE_DTYPES)}")
        _require(self.device in ("cpu", "cuda"), "train.device must be 'cpu' or 'cuda'")


@dataclass(frozen=True)
class TrainConfig:
    """A whole configuration: what is trained, on which pieces, and how."""

    model: ModelSpec
    tokenizer: TokenizerConfig = TokenizerConfig()
    train: TrainSettings = TrainSettings()

    def to_dict(self) -> dict[str, Any]:
        """Gives plain values for JSON; `from_dict` reads them back."""
        tokenizer = {**asdict(self.tokenizer), "steps": list(self.tokenizer.steps)}
        return {"model": self.model.to_dict(), "tokenizer": tokenizer, "train": asdict(self.train)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """Reads plain values.

        Raises:
            SetupError: A key is missing, unknown, or has a bad value.
        """
        unknown = sorted(set(values) - {"model", "tokenizer", "train"})
        _require(not unknown and "model" in values, f"needs [model]; knows no {', '.join(unknown) or 'other table'}")
        train = dict(values.get("train", {}))
        if "dropout" in train:
            train["dropout"] = _read(Dropout, train["dropout"], "train.dropout")
        return cls(
            ModelSpec.from_dict(values["model"]),
            _read(TokenizerConfig, values.get("tokenizer", {}), "tokenizer"),
            _read(TrainSettings, train, "train"),
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
