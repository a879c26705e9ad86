"""OLMoE (Muennighoff et al., "OLMoE: Open Mixture-of-Experts Language Models", 2024)."""

from __future__ import annotations

from expertmesh.checkpoint.huggingface.config import Config
from expertmesh.checkpoint.huggingface.families.family import Family, decoder, expert_count, grouped, head_width
from expertmesh.checkpoint.huggingface.rotary import Rope
from expertmesh.model.spec import ExpertSpec, ModelSpec, RouterSpec


def _spec(config: Config, family: Family) -> ModelSpec:
    rope = Rope.read(config, family.theta)
    bias = config.flag("attention_bias")
    clip = config.number("clip_qkv") if config.has("clip_qkv") else 0.0
    if clip <= 0 and config.has("clip_qkv"):
        raise config.error("clip_qkv must be positive, or null for no clipping")
    return decoder(
        config,
        rope,
        rope.spec(head_width(config)),
        grouped(config, qk_norm="flat", clip=clip, qkv_bias=bias, out_bias=bias),
        RouterSpec(
            experts=expert_count(config, "num_experts"),
            top_k=config.integer("num_experts_per_tok"),
            renormalise=config.flag("norm_topk_prob"),
        ),
        ExpertSpec(width=config.integer("intermediate_size")),
    )


OLMOE = Family(
    model_type="olmoe",
    defaults={
        "vocab_size": 50304,
        "hidden_size": 2048,
        "intermediate_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": None,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 50279,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "clip_qkv": None,
        "num_experts_per_tok": 8,
        "num_experts": 64,
        "norm_topk_prob": False,
    },
    spec=_spec,
)
