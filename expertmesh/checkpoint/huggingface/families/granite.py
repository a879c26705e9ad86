"""Granite MoE (IBM, "Granite 3.0 Language Models", 2024), with multipliers in many places."""

from __future__ import annotations

from expertmesh.checkpoint.huggingface.config import Config
from expertmesh.checkpoint.huggingface.families.family import Family, decoder, expert_count, grouped, head_width
from expertmesh.checkpoint.huggingface.rotary import Rope
from expertmesh.model.spec import ExpertSpec, ModelSpec, RouterSpec


def _spec(config: Config, family: Family) -> ModelSpec:
    rope = Rope.read(config, family.theta)
    bias = config.flag("attention_bias")
    scale = config.number("attention_multiplier")
    if scale <= 0:
        raise config.error(f"attention_multiplier must be positive, not {scale}")
    return decoder(
        config,
        rope,
        rope.spec(head_width(config)),
        grouped(config, scale=scale, qkv_bias=bias, out_bias=bias),
        RouterSpec(
            experts=expert_count(config, "num_local_experts"),
            top_k=config.integer("num_experts_per_tok"),
            score="softmax_top",
        ),
        ExpertSpec(width=config.integer("intermediate_size")),
        divisor=config.number("logits_scaling"),
        embedding_multiplier=config.number("embedding_multiplier"),
        residual_multiplier=config.number("residual_multiplier"),
    )


GRANITEMOE = Family(
    model_type="granitemoe",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 1.0,
        "attention_multiplier": 1.0,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
    },
    spec=_spec,
)
