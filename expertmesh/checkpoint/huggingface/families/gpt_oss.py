"""gpt-oss (OpenAI, "gpt-oss-120b & gpt-oss-20b Model Card", 2025)."""

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
from expertmesh.model.spec import ExpertSpec, ModelSpec, RouterSpec


def _spec(config: Config, family: Family) -> ModelSpec:
    rope = Rope.read(config, family.theta)
    bias, tokens = config.flag("attention_bias"), window(config)
    if config.has("layer_types"):
        windows = layer_windows(config, tokens)
    else:
        windows = tuple(0 if layer % 2 else tokens for layer in range(layer_count(config)))
    return decoder(
        config,
        rope,
        rope.spec(head_width(config)),
        grouped(config, windows=windows, sinks=True, qkv_bias=bias, out_bias=bias),
        RouterSpec(
            experts=expert_count(config, "num_local_experts"),
            top_k=config.integer("num_experts_per_tok"),
            score="softmax_top",
            bias=True,
        ),
        ExpertSpec(
            width=config.integer("intermediate_size"),
            activation="swiglu_clamped",
            limit=config.number("swiglu_limit"),
            alpha=config.number("swiglu_alpha"),
            bias=True,
        ),
    )


GPT_OSS = Family(
    model_type="gpt_oss",
    defaults={
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        "sliding_window": 128,
        "num_experts_per_tok": 4,
        "num_local_experts": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "layer_types": None,
        "attention_bias": True,
        "rope_parameters": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    },
    spec=_spec,
    theta=150_000.0,
    has_interleaved_experts=True,
)
