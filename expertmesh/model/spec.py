"""What a model is: sizes and switches, and nothing that its tensors already say.

A `ModelSpec` is read by the trainer, the importer, the splitter, every service and the gateway; it imports no torch.
Families differ in the values of these fields and in nothing else; a value that is not known here is refused by name.
"""

from __future__ import annotations

from dataclasses import MISSING, asdict, dataclass, fields
from math import isfinite
from typing import Any, TypeVar, get_type_hints

from expertmesh.errors import BadCheckpoint

T = TypeVar("T")

DTYPES = ("float32", "bfloat16")


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise BadCheckpoint(f"model spec: {message}")


def _known(name: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{name} = {value!r} is not known; known: {', '.join(allowed)}")


@dataclass(frozen=True)
class EmbeddingSpec:
    """Token embeddings times `multiplier`; learned position embeddings; embeddings of hashed token bigrams.

    The bigrams are the features of fastText (Joulin et al., "Bag of Tricks for Efficient Text Classification",
    EACL 2017): row `hash(previous, token) mod bigram_buckets` of a table `bigram_width` wide, projected to the
    model width. `bigram_buckets = 0` leaves them out.
    """

    vocab: int
    bigram_buckets: int = 0
    bigram_width: int = 0
    learned_positions: bool = True
    multiplier: float = 1.0

    def __post_init__(self) -> None:
        _require(self.vocab > 0, "embedding.vocab must be positive")
        _require(self.bigram_buckets >= 0 and self.bigram_width >= 0, "bigram sizes must not be negative")
        _require((self.bigram_buckets > 0) == (self.bigram_width > 0), "bigram_buckets and bigram_width go together")


@dataclass(frozen=True)
class RotarySpec:
    """Rotary position embedding (Su et al., "RoFormer", 2021) of the first `2 * len(frequencies)` elements of a head.

    Scaled variants (linear, llama3, yarn, longrope) differ in their frequencies, which are stored, and their magnitude.

    Attributes:
        frequencies: Angle per position of each pair, in radians; empty for no rotation.
        interleaved: Whether a pair is two neighbours (2i, 2i+1) instead of (i, i + half).
        magnitude: Factor on cosine and sine.
    """

    frequencies: tuple[float, ...] = ()
    interleaved: bool = False
    magnitude: float = 1.0


@dataclass(frozen=True)
class AttentionSpec:
    """Scaled dot-product attention (Vaswani et al., 2017).

    `bidirectional` sees the whole sequence. `grouped` is causal with `kv_heads` heads of keys and values shared by
    groups of query heads (Ainslie et al., "GQA", 2023). `latent` is causal with keys and values expanded from one
    latent row per token (DeepSeek-AI, "DeepSeek-V2", 2024, multi-head latent attention).

    Attributes:
        heads: Query heads.
        kind: See above.
        kv_heads: Key heads of `grouped`.
        head_width: Elements of a head's queries and keys: for `latent` the part without rotation.
        value_width: Elements of a head's values in `latent`.
        scale: Factor on the scores; 0 stands for `head_width ** -0.5`.
        windows: For each layer how many of the latest tokens are seen, itself included; 0 for all. Empty: all layers 0.
        sinks: Whether each head has a learned logit in the denominator of its softmax.
        qk_norm: Norm of queries and keys before the rotation: `none`, of each `head`, or `flat` over all heads.
        clip: Queries, keys and values are clamped to +-clip; 0 for not at all.
        qkv_bias: Whether these projections have a bias.
        out_bias: Whether the output projection has one.
        query_rank: Of `latent`: width of the queries' bottleneck; 0 for none.
        latent_rank: Of `latent`: width of the row that keys and values are expanded from.
        latent_eps: Of `latent`: epsilon of the norms inside the attention.
    """

    heads: int
    kind: str = "bidirectional"
    kv_heads: int = 0
    head_width: int = 0
    value_width: int = 0
    scale: float = 0.0
    windows: tuple[int, ...] = ()
    sinks: bool = False
    qk_norm: str = "none"
    clip: float = 0.0
    qkv_bias: bool = False
    out_bias: bool = False
    query_rank: int = 0
    latent_rank: int = 0
    latent_eps: float = 1e-6

    def __post_init__(self) -> None:
        _require(self.heads > 0, "attention.heads must be positive")
        _known("attention.kind", self.kind, ("bidirectional", "grouped", "latent"))
        _known("attention.qk_norm", self.qk_norm, ("none", "head", "flat"))
        _require(all(window >= 0 for window in self.windows), "attention.windows must not be negative")
        _require(self.scale >= 0 and self.clip >= 0, "attention.scale and attention.clip must not be negative")
        if self.kind != "bidirectional":
            _require(self.head_width > 0, "attention.head_width must be positive")
        if self.kind == "grouped":
            _require(
                self.kv_heads > 0 and self.heads % self.kv_heads == 0,
                "attention.heads must be a multiple of attention.kv_heads",
            )
        if self.kind == "latent":
            _require(self.latent_rank > 0 and self.value_width > 0, "latent attention needs latent_rank, value_width")
            _require(self.query_rank >= 0, "attention.query_rank must not be negative")
            _require(self.qk_norm == "none" and not self.clip, "latent attention has no qk_norm and no clip")

    @property
    def is_causal(self) -> bool:
        """Whether a token sees only itself and what stands before it, so that keys and values can be cached."""
        return self.kind != "bidirectional"

    def window(self, layer: int) -> int:
        """How many tokens are seen in a layer; 0 for all."""
        return self.windows[layer] if self.windows else 0


@dataclass(frozen=True)
class RouterSpec:
    """A linear layer scores all experts in fp32; the best `top_k` are taken, with weights.

    Attributes:
        score: `softmax` over all experts, then the best; `softmax_top`: the best logits, then softmax over those;
            `sigmoid` of each, then the best; `sparsemixer`: two rounds of a masked softmax (Microsoft, "GRIN", 2024).
        renormalise: Whether the weights are divided by their sum.
        bias: Whether the linear layer has a bias.
        selection_bias: Whether a bias is added to the scores for choosing only (DeepSeek-AI, "DeepSeek-V3", 2024).
        groups: Groups of experts of which only the best `kept_groups` are considered; 1: no groups.
        group_score: Score of a group: its `max`, or the sum of its best two, `top2`.
        scale: Factor on the weights, at the end.
        jitter: Of `sparsemixer`: the masking threshold is twice this.
    """

    experts: int = 8
    top_k: int = 2
    score: str = "softmax"
    renormalise: bool = True
    bias: bool = False
    selection_bias: bool = False
    groups: int = 1
    kept_groups: int = 1
    group_score: str = "max"
    scale: float = 1.0
    jitter: float = 0.01

    def __post_init__(self) -> None:
        _require(self.experts > 0, "router.experts must be positive")
        _require(0 < self.top_k <= self.experts, f"router.top_k must be in [1, {self.experts}], not {self.top_k}")
        _known("router.score", self.score, ("softmax", "softmax_top", "sigmoid", "sparsemixer"))
        _known("router.group_score", self.group_score, ("max", "top2"))
        _require(self.groups > 0 and self.experts % self.groups == 0, "router.experts must divide into router.groups")
        _require(0 < self.kept_groups <= self.groups, "router.kept_groups must be in [1, router.groups]")
        kept = self.kept_groups * (self.experts // self.groups)
        _require(self.top_k <= kept, "router.top_k is more than the experts of the kept groups")
        if self.group_score == "top2" and self.kept_groups < self.groups:
            _require(self.experts > self.groups, "router.group_score top2 needs groups of two experts or more")
        if self.score == "sparsemixer":
            _require(self.top_k == 2, "a sparsemixer router takes 2 experts")


@dataclass(frozen=True)
class ExpertSpec:
    """A gated MLP: down(act(gate(x)) * up(x)) (Shazeer, "GLU Variants Improve Transformer", 2020).

    Attributes:
        width: Expert width F.
        activation: `swiglu`, or `swiglu_clamped`: gate and up are clamped to `limit`, the sigmoid has the slope
            `alpha`, and 1 is added to up (OpenAI, gpt-oss model card, 2025).
        limit: Of `swiglu_clamped`.
        alpha: Of `swiglu_clamped`.
        bias: Whether the three layers have a bias.
    """

    width: int
    activation: str = "swiglu"
    limit: float = 7.0
    alpha: float = 1.702
    bias: bool = False

    def __post_init__(self) -> None:
        _require(self.width > 0, "expert.width must be positive")
        _known("expert.activation", self.activation, ("swiglu", "swiglu_clamped"))
        _require(self.limit > 0, "expert.limit must be positive")


@dataclass(frozen=True)
class DenseSpec:
    """What gating computes beside or instead of routed experts.

    Attributes:
        layers: Layers that have one MLP of `width` instead of experts.
        width: Its width; 0 where there is no such layer.
        shared_width: Width of the shared expert that every token of the other layers uses; 0 for none.
        shared_gate: Whether its output is multiplied by the sigmoid of a learned score of the token.
    """

    layers: tuple[int, ...] = ()
    width: int = 0
    shared_width: int = 0
    shared_gate: bool = False

    def __post_init__(self) -> None:
        _require(self.width >= 0 and self.shared_width >= 0, "dense widths must not be negative")
        _require(bool(self.layers) == (self.width > 0), "dense.layers and dense.width go together")
        _require(not self.shared_gate or self.shared_width > 0, "dense.shared_gate needs dense.shared_width")


@dataclass(frozen=True)
class HeadSpec:
    """The last norm, and pooling with one linear layer to the classes, or one linear layer to the next token.

    Attributes:
        labels: Of a `classifier`: its classes.
        pool: Of a `classifier`: how the rows of a sequence become one.
        kind: `classifier` or `language`.
        divisor: Of `language`: logits are divided by it.
        bias: Of `language`: whether the linear layer has a bias.
        end_ids: Of `language`: tokens that end an answer.
    """

    labels: tuple[str, ...] = ()
    pool: str = "mean_max"
    kind: str = "classifier"
    divisor: float = 1.0
    bias: bool = False
    end_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _known("head.kind", self.kind, ("classifier", "language"))
        _known("head.pool", self.pool, ("mean", "max", "mean_max"))
        if self.kind == "classifier":
            _require(len(self.labels) > 1, "head.labels needs at least two classes")
        _require(len(set(self.labels)) == len(self.labels), "head.labels must differ from each other")
        _require(self.divisor > 0, "head.divisor must be positive")


@dataclass(frozen=True)
class NormSpec:
    """The norm before attention, experts and head: `layernorm`, or `rms` (Zhang and Sennrich, 2019), always in fp32."""

    eps: float = 1e-5
    kind: str = "layernorm"

    def __post_init__(self) -> None:
        _require(self.eps > 0, "norm.eps must be positive")
        _known("norm.kind", self.kind, ("layernorm", "rms"))


@dataclass(frozen=True)
class ModelSpec:
    """A transformer of pre-norm residual blocks, each attention followed by a mixture of experts or a dense MLP.

    Attributes:
        width: Model width D.
        layers: Number of blocks; every block has weights of its own.
        context: Most tokens in a sequence.
        residual_multiplier: Factor on what attention and experts add to the residual stream.
        dtype: What matrices are stored and multiplied in; residual stream, norms and router are in float32 always.
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
    rotary: RotarySpec = RotarySpec()
    dense: DenseSpec = DenseSpec()
    residual_multiplier: float = 1.0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _require(self.width > 0 and self.layers > 0 and self.context > 0, "width, layers and context must be positive")
        _require(self.width > 1, "width must be at least 2")
        _known("dtype", self.dtype, DTYPES)
        attention, rotated = self.attention, 2 * len(self.rotary.frequencies)
        if attention.kind == "bidirectional":
            _require(self.width % attention.heads == 0, "width must be a multiple of attention.heads")
            _require(not rotated and not self.dense.layers, "bidirectional attention has no rotation or dense layers")
            _require(self.dtype == "float32", "bidirectional attention is computed in float32")
        if attention.kind == "grouped":
            _require(rotated <= attention.head_width, "rotary.frequencies are more than a head has pairs")
        _require(len(attention.windows) in (0, self.layers), "attention.windows needs one number for each layer")
        _require(
            all(0 <= layer < self.layers for layer in self.dense.layers)
            and list(self.dense.layers) == sorted(set(self.dense.layers)),
            "dense.layers must ascend and name layers of the model",
        )
        _require((self.head.kind == "language") == attention.is_causal, "a language head goes with causal attention")
        ends = self.head.end_ids
        _require(all(0 <= end < self.embedding.vocab for end in ends), "head.end_ids must be in the vocabulary")

    @property
    def generates(self) -> bool:
        """Whether it generates text; otherwise it classifies."""
        return self.head.kind == "language"

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """The layers that have experts, ascending."""
        return tuple(layer for layer in range(self.layers) if layer not in self.dense.layers)

    def to_dict(self) -> dict[str, Any]:
        """Gives plain values for JSON; `from_dict` reads them back."""
        return {key: _plain(value) for key, value in asdict(self).items()}

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
            "rotary": RotarySpec,
            "dense": DenseSpec,
        }
        if not isinstance(values, dict):
            raise BadCheckpoint("model spec: it must be a table")
        plain = dict(values)
        for name, stage in stages.items():
            if name in plain:
                plain[name] = _from_dict(stage, plain[name], name)
        return _from_dict(cls, plain, "model")


def _plain(value: Any) -> Any:
    """A value with lists in place of tuples, as JSON reads it back."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return list(value) if isinstance(value, tuple) else value


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


_TUPLES = {tuple[str, ...]: (str, "strings"), tuple[int, ...]: (int, "integers"), tuple[float, ...]: (float, "numbers")}


def _typed(value: Any, kind: Any, name: str) -> Any:
    """A value of JSON or TOML as the type of its field; nothing is converted but what those formats cannot tell."""
    if kind in _TUPLES:
        entry_kind, plural = _TUPLES[kind]
        _require(isinstance(value, list | tuple), f"{name} must be a list of {plural}")
        return tuple(_typed(entry, entry_kind, f"{name}[{index}]") for index, entry in enumerate(value))
    if kind is float and type(value) is int:
        value = float(value)
    _require(type(value) is kind, f"{name} must be of type {kind.__name__}, not {type(value).__name__}")
    _require(kind is not float or isfinite(value), f"{name} must be finite")
    return value
