"""The tables of a training configuration besides the model, each checked by itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any, TypeVar

from expertmesh.errors import SetupError
from expertmesh.model.layers import NO_DROPOUT, Dropout
from expertmesh.tokenization.normalizer import NEWS_STEPS, STEPS

T = TypeVar("T")
STORAGE_DTYPES = ("float32", "float16", "bfloat16")


def require(holds: bool, message: str) -> None:
    """Raises SetupError with the message unless it holds."""
    if not holds:
        raise SetupError(f"training configuration: {message}")


def read_table(cls: type[T], values: Any, where: str) -> T:
    """Reads a dataclass whose fields all have defaults; nothing is converted but integers where a float is asked for.

    Raises:
        SetupError: A key is unknown, or a value of another type than its default.
    """
    require(isinstance(values, dict), f"{where} must be a table")
    types = {field.name: type(field.default) for field in fields(cls)}  # type: ignore[arg-type]
    plain = {}
    for name, value in values.items():
        require(name in types, f"{where}.{name} is not known")
        plain[name] = tuple(value) if isinstance(value, list) else value
        if types[name] is float and type(value) is int:
            plain[name] = float(value)
        require(type(plain[name]) is types[name], f"{where}.{name} must be of type {types[name].__name__}")
    return cls(**plain)


@dataclass(frozen=True)
class TokenizerConfig:
    """How the vocabulary is made and used in training; its size is `model.embedding.vocab`.

    Attributes:
        steps: Normaliser steps of a classifier, in order; a language model reads texts as they are.
        character_coverage: Share of the characters of the training text that get a piece of their own.
        sampling_alpha: Sharpness of a classifier's subword regularisation, or how often a language model's merges are
            left out; 0 always takes the best segmentation.
    """

    steps: tuple[str, ...] = NEWS_STEPS
    character_coverage: float = 0.9999
    sampling_alpha: float = 0.0

    def __post_init__(self) -> None:
        require(all(step in STEPS for step in self.steps), f"tokenizer.steps must be among {', '.join(STEPS)}")
        require(0 < self.character_coverage <= 1, "tokenizer.character_coverage must be in (0, 1]")
        require(self.sampling_alpha >= 0, "tokenizer.sampling_alpha must not be negative")


@dataclass(frozen=True)
class TextSettings:
    """What only a language model's training has.

    Attributes:
        window: Tokens of a training window; 0 for the whole context.
        others_share: Share of windows that come from other files than the first.
        last_epochs: Epochs at the end that read the first file alone.
        judge_every: Epochs between two looks at the held-out text; one is always taken after the last.
    """

    window: int = 0
    others_share: float = 0.0
    last_epochs: int = 0
    judge_every: int = 1

    def __post_init__(self) -> None:
        require(self.window >= 0 and self.window != 1, "texts.window must be 0 or at least 2")
        require(0 <= self.others_share <= 1, "texts.others_share must be in [0, 1]")
        require(self.last_epochs >= 0, "texts.last_epochs must not be negative")
        require(self.judge_every > 0, "texts.judge_every must be positive")


@dataclass(frozen=True)
class TrainSettings:
    """The optimisation.

    Attributes:
        epochs: Passes over the rows, or for a language model as many windows as the first text has.
        batch_rows: Texts, or windows of text, per step.
        learning_rate: Peak of the schedule: linear warm-up, then a cosine down to `final_rate` of the peak.
        decay_epochs: Above 0 the rate stays at its peak and falls in the last so many epochs only.
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
    decay_epochs: int = 0
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
            require(getattr(self, name) > 0, f"train.{name} must be positive")
        require(self.decay_epochs <= self.epochs, "train.decay_epochs must not be more than train.epochs")
        require(0 < self.embedding_rate <= 1, "train.embedding_rate must be in (0, 1]")
        for name in ("seed", "warmup_steps", "threads", "save_every_steps", "decay_epochs"):
            require(getattr(self, name) >= 0, f"train.{name} must not be negative")
        for name in ("weight_decay", "embedding_weight_decay"):
            require(getattr(self, name) >= 0, f"train.{name} must not be negative")
        for name in ("balance_weight", "router_z_weight", "consistency_weight"):
            require(getattr(self, name) >= 0, f"train.{name} must not be negative")
        for name in ("final_rate", "word_dropout", "title_dropout", "label_smoothing", "teacher_weight", "ema_decay"):
            require(0 <= getattr(self, name) < 1, f"train.{name} must be in [0, 1)")
        for name, rate in asdict(self.dropout).items():
            require(0 <= rate < 1, f"train.dropout.{name} must be in [0, 1)")
        require(self.autocast in ("none", "bfloat16"), "train.autocast must be 'none' or 'bfloat16'")
        require(self.storage_dtype in STORAGE_DTYPES, f"train.storage_dtype must be among {', '.join(STORAGE_DTYPES)}")
        require(self.device in ("cpu", "cuda"), "train.device must be 'cpu' or 'cuda'")
