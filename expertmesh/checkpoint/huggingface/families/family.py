"""What a model type is to the importer, and what all of them have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from expertmesh.checkpoint.huggingface.config import Config
from expertmesh.checkpoint.huggingface.rotary import Rope
from expertmesh.model.spec import (
    AttentionSpec,
    DenseSpec,
    EmbeddingSpec,
    ExpertSpec,
    HeadSpec,
    ModelSpec,
    NormSpec,
    RotarySpec,
    RouterSpec,
)

MAX_LAYERS, MAX_EXPERTS = 999, 999


@dataclass(frozen=True)
class Family:
    """One model type.

    Attributes:
        model_type: Its name in `config.json`.
        defaults: What missing keys stand for: the defaults of the transformers class.
        spec: Reads the keys; the head's end ids are not its business.
        theta: Default of `rope_theta`.
        has_interleaved_experts: Whether experts lie as [E, in, out] with gate and up in turns.
        has_predictors: Whether layers for predicting several tokens may follow, which are left out.
        remote_code: Values of `auto_map` that name the code the model was first published with.
    """

    model_type: str
    defaults: Mapping[str, Any]
    spec: Callable[[Config, Family], ModelSpec]
    theta: float = 10_000.0
    has_interleaved_experts: bool = False
    has_predictors: bool = False
    remote_code: frozenset[str] = frozenset()


def head_width(config: Config) -> int:
    """`head_dim`, or the model's width divided among the heads."""
    heads = config.integer("num_attention_heads")
    width = config.optional_integer("head_dim")
    return width or config.integer("hidden_size") // heads


def layer_count(config: Config) -> int:
    """`num_hidden_layers`, of which part names allow so many."""
    layers = config.integer("num_hidden_layers")
    if layers > MAX_LAYERS:
        raise config.error(f"num_hidden_layers = {layers} is more than {MAX_LAYERS}")
    return layers


def expert_count(config: Config, key: str) -> int:
    """The number of experts, of which part names allow so many."""
    experts = config.integer(key)
    if experts > MAX_EXPERTS:
        raise config.error(f"{key} = {experts} is more than {MAX_EXPERTS}")
    return experts


def window(config: Config) -> int:
    """`sliding_window`, 0 for none."""
    return config.optional_integer("sliding_window", minimum=0) or 0


def layer_windows(config: Config, tokens: int) -> tuple[int, ...]:
    """The window of each layer by `layer_types`."""
    kinds = config.value("layer_types")
    layers = layer_count(config)
    if not isinstance(kinds, list) or len(kinds) != layers:
        raise config.error(f"layer_types must be a list of {layers} names")
    unknown = [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]
    if unknown:
        raise config.error(f"layer_types has {unknown[0]!r}; implemented: full_attention, sliding_attention")
    if "sliding_attention" in kinds and tokens < 1:
        raise config.error("layer_types has sliding_attention, but sliding_window is not set")
    return tuple(tokens if kind == "sliding_attention" else 0 for kind in kinds)


def _useful(windows: tuple[int, ...], context: int) -> tuple[int, ...]:
    """Windows without those that no sequence outgrows."""
    useful = tuple(tokens if tokens < context else 0 for tokens in windows)
    return useful if any(useful) else ()


def grouped(config: Config, **more: Any) -> AttentionSpec:
    """Attention with `num_key_value_heads`, in whole groups."""
    heads = config.integer("num_attention_heads")
    return AttentionSpec(
        heads=heads,
        kind="grouped",
        kv_heads=config.optional_integer("num_key_value_heads") or heads,
        head_width=head_width(config),
        **more,
    )


def decoder(
    config: Config,
    rope: Rope,
    rotary: RotarySpec,
    attention: AttentionSpec,
    router: RouterSpec,
    expert: ExpertSpec,
    *,
    dense: DenseSpec | None = None,
    norm: str = "rms",
    head_bias: bool = False,
    divisor: float = 1.0,
    embedding_multiplier: float = 1.0,
    residual_multiplier: float = 1.0,
) -> ModelSpec:
    """A causal decoder, with the keys that every family has."""
    config.only("hidden_act", "silu", "swish")
    return ModelSpec(
        width=config.integer("hidden_size"),
        layers=layer_count(config),
        context=rope.context,
        embedding=EmbeddingSpec(
            vocab=config.integer("vocab_size"),
            learned_positions=False,
            multiplier=embedding_multiplier,
        ),
        attention=replace(attention, windows=_useful(attention.windows, rope.context)),
        router=router,
        expert=expert,
        head=HeadSpec(kind="language", bias=head_bias, divisor=divisor),
        norm=NormSpec(eps=config.number("rms_norm_eps"), kind=norm),
        rotary=rotary,
        dense=dense or DenseSpec(),
        residual_multiplier=residual_multiplier,
    )
