"""Qwen2-MoE and Qwen3-MoE (Qwen team, "Qwen2 Technical Report", 2024, and "Qwen3 Technical Report", 2025)."""

from __future__ import annotations

from expertmesh.checkpoint.huggingface.config import Config
from expertmesh.checkpoint.huggingface.families.family import (
    Family,
    decoder,
    expert_count,
    grouped,
    head_width,
    layer_count,
    layer_windows,
    window,
)
from expertmesh.checkpoint.huggingface.rotary import Rope
from expertmesh.model.spec import DenseSpec, ExpertSpec, ModelSpec, RouterSpec


def _router(config: Config) -> RouterSpec:
    return RouterSpec(
        experts=expert_count(config, "num_experts"),
        top_k=config.integer("num_experts_per_tok"),
        renormalise=config.flag("norm_topk_prob"),
    )


def _dense(config: Config, shared_width: int = 0) -> DenseSpec:
    """Layers named in `mlp_only_layers` have no experts, and of the others only every `decoder_sparse_step`th has."""
    named, step = set(config.integers("mlp_only_layers")), config.integer("decoder_sparse_step")
    layers = tuple(layer for layer in range(layer_count(config)) if layer in named or (layer + 1) % step)
    width = config.integer("intermediate_size")
    return DenseSpec(layers, width if layers else 0, shared_width, shared_gate=shared_width > 0)


def _qwen2(config: Config, family: Family) -> ModelSpec:
    rope = Rope.read(config, family.theta)
    is_sliding, first_full = config.flag("use_sliding_window"), config.integer("max_window_layers", minimum=0)
    tokens = window(config) if is_sliding else 0
    config.value("sliding_window")
    if config.has("layer_types"):
        windows = layer_windows(config, tokens)
    elif is_sliding and tokens < 1:
        raise config.error("use_sliding_window is set, but sliding_window is not")
    else:
        slides = [is_sliding and layer < first_full and layer % 2 == 0 for layer in range(layer_count(config))]
        windows = tuple(tokens if slide else 0 for slide in slides)
    return decoder(
        config,
        rope,
        rope.spec(head_width(config)),
        grouped(config, qkv_bias=config.flag("qkv_bias"), windows=windows),
        _router(config),
        ExpertSpec(width=config.integer("moe_intermediate_size")),
        dense=_dense(config, config.integer("shared_expert_intermediate_size")),
    )


def _qwen3(config: Config, family: Family) -> ModelSpec:
    rope = Rope.read(config, family.theta)
    is_sliding = config.flag("use_sliding_window")
    tokens = window(config) if is_sliding else 0
    for unused in ("sliding_window",) if is_sliding else ("sliding_window", "max_window_layers"):
        config.value(unused)
    bias = config.flag("attention_bias")
    return decoder(
        config,
        rope,
        rope.spec(head_width(config)),
        grouped(
            config,
            qk_norm="head",
            qkv_bias=bias,
            out_bias=bias,
            windows=(tokens,) * layer_count(config),
        ),
        _router(config),
        ExpertSpec(width=config.integer("moe_intermediate_size")),
        dense=_dense(config),
    )


_COMMON = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "num_hidden_layers": 24,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "decoder_sparse_step": 1,
    "norm_topk_prob": False,
    "mlp_only_layers": None,
}

QWEN2_MOE = Family(
    model_type="qwen2_moe",
    defaults=_COMMON
    | {
        "intermediate_size": 5632,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "max_window_layers": 28,
        "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
        "num_experts_per_tok": 4,
        "num_experts": 60,
        "qkv_bias": True,
        "layer_types": None,
    },
    spec=_qwen2,
)

QWEN3_MOE = Family(
    model_type="qwen3_moe",
    defaults=_COMMON
    | {
        "intermediate_size": 6144,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
    },
    spec=_qwen3,
)
