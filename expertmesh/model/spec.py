"""What a model is: sizes and switches, and nothing that its tensors already say.

A `ModelSpec` is read by the trainer, the splitter, every service and the gateway; it imports no torch.
Families of decoders will add values to the `kind` fields; a value that is not known here is refused by name.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from math import isfinite
from typing import Any, TypeVar, get_type_hints

from expertmesh.errors import BadCheckpoint

T = TypeVar("T")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise BadCheckpoint(f"model spec: {message}")


def _known(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name} = {value!r} is not known; known: {', '.join(allowed)}")


@dataclass(frozen=True)
class EmbeddingSpec:
    """Token and learned position embeddings, and optionally embeddings of hashed token bigrams.

    The bigrams are the features of fastText (Joulin et al., "Bag of Tricks for Efficient Text Classification",
    EACL 2017): row `hash(previous, token) mod bigram_buckets` of a table `bigram_width` wide, projected to the
    model width. `bigram_buckets = 0` leaves them out.
    """

    vocab: int
    bigram_buckets: int = 0
    bigram_width: int = 0

    def __post_init__(self) -> None:
        _require(self.vocab > 0, "embedding.vocab must be positive")
        _require(self.bigram_buckets >= 0 and self.bigram_width >= 0, "bigram sizes must not be negative")
        _require((self.bigram_buckets > 0) == (self.bigram_width > 0), "bigram_buckets and bigram_width go together")


@dataclass(frozen=True)
class AttentionSpec:
    """Multi-head attention over a whole sequence (Vaswani et al., 2017), without a mask of the future."""

    heads: int
    kind: str = "bidirectional"

    def __post_init__(self) -> None:
        _require(self.heads > 0, "attention.heads must be positive")
        _known("attention.kind", self.kind, ("bidirectional",))


@dataclass(frozen=True)
class RouterSpec:
    """Softmax over all experts in fp32, the best `top_k` of them, their weights renormalised to sum to 1."""

    experts: int = 8
    top_k: int = 2
    score: str = "softmax"
    renormalise: bool = True

    def __post_init__(self) -> None:
        _require(self.experts > 0, "router.experts must be positive")
        _require(0 < self.top_k <= self.experts, f"router.top_k must be in [1, {self.experts}], not {self.top_k}")
        _known("router.score", self.score, ("softmax",))


@dataclass(frozen=True)
class ExpertSpec:
    """A gated MLP: down(act(gate(x)) * up(x)) (Shazeer, "GLU Variants Improve Transformer", 2020)."""

    width: int
    activation: str = "swiglu"

    def __post_init__(self) -> None:
        _require(self.width > 0, "expert.width must be positive")
        _known("expert.activation", self.activation, ("swiglu",))


@dataclass(frozen=True)
class HeadSpec:
    """The last norm, pooling over the tokens of a sequence, and one linear layer to the classes."""

    labels: tuple[str, ...]
    pool: str = "mean_max"
    kind: str = "classifier"

    def __post_init__(self) -> None:
        _require(len(self.labels) > 1, "head.labels needs at least two classes")
        _require(len(set(self.labels)) == len(self.labels), "head.labels must differ from each other")
        _known("head.pool", self.pool, ("mean", "max", "mean_max"))
        _known("head.kind", self.kind, ("classifier",))


@dataclass(frozen=True)
class NormSpec:
    """The norm before attention, experts and head."""

    eps: float = 1e-5
    kind: str = "layernorm"

    def __post_init__(self) -> None:
        _require(self.eps > 0, "norm.eps must be positive")
        _known("norm.kind", self.kind, ("layernorm",))


@dataclass(frozen=True)
class ModelSpec:
    """A transformer of pre-norm residual blocks, each attention followed by a mixture of experts.

    Attributes:
        width: Model width D.
        layers: Number of blocks; every block has experts of its own.
        context: Most tokens in a sequence; longer texts are cut.
    """

    width: int
    layers: int
    context: int
    embedding: EmbeddingSpec
    attention: AttentionSpec
    router: RouterSpec
    expert: ExpertSpec
    head: HeadSpec
    norm: NormSpec = NormSpec()

    def __post_init__(self) -> None:
        _require(self.width > 0 and self.layers > 0 and self.context > 0, "width, layers and context must be positive")
        _require(self.width > 1, "width must be at least 2")
        _require(self.width % self.attention.heads == 0, "width must be a multiple of attention.heads")

    def to_dict(self) -> dict[str, Any]:
        """Gives plain values for JSON; `from_dict` reads them back."""
        return {**asdict(self), "head": {**asdict(self.head), "labels": list(self.head.labels)}}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModelSpec:
        """Reads plain values.

        Raises:
            BadCheckpoint: A key is missing, unknown, or has a value that is not understood.
        """
        stages = {
            "embedding": EmbeddingSpec,
            "attention": AttentionSpec,
            "router": RouterSpec,
            "expert": ExpertSpec,
            "head": HeadSpec,
            "norm": NormSpec,
        }
        if not isinstance(values, dict):
            raise BadCheckpoint("model spec: it must be a table")
        plain = dict(values)
        for name, stage in stages.items():
            if name in plain:
                plain[name] = _from_dict(stage, plain[name], name)
        return _from_dict(cls, plain, "model")


def _from_dict(cls: type[T], values: Any, where: str) -> T:
    if not isinstance(values, dict):
        raise BadCheckpoint(f"model spec: {where} must be a table")
    hints = get_type_hints(cls)
    unknown = sorted(str(key) for key in values.keys() - hints.keys())
    _require(not unknown, f"{where} has keys that are not known: {', '.join(unknown)}")
    missing = [
        entry.name
        for entry in fields(cls)  # type: ignore[arg-type]
        if entry.default is MISSING and entry.name not in values
    ]
    _require(not missing, f"{where} misses: {', '.join(missing)}")
    return cls(**{key: _typed(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def _typed(value: Any, kind: Any, name: str) -> Any:
    """A value of JSON or TOML as the type of its field; nothing is converted but what those formats cannot tell."""
    if kind == tuple[str, ...]:
        fits = isinstance(value, list | tuple) and all(isinstance(item, str) for item in value)
        _require(fits, f"{name} must be a list of strings")
        return tuple(value)
    if kind is float and type(value) is int:
        value = float(value)
    _require(type(value) is kind, f"{name} must be of type {kind.__name__}, not {type(value).__name__}")
    _require(kind is not float or isfinite(value), f"{name} must be finite")
    return value
