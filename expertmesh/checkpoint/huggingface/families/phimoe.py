"""Phi-3.5-MoE (Microsoft, "Phi-3 Technical Report" and "GRIN", 2024).

The rotation depends on whether a sequence is longer than the original context; keys that are cached cannot be turned
again when it becomes so. The choice is therefore made once, by the context that is asked for.
"""

from __future__ import annotations

from expertmesh.checkpoint.huggingface.config import Config
from expertmesh.checkpoint.huggingface.families.family import (
    Family,
    decoder,
    expert_count,
    grouped,
    head_width,
    layer_count,
    window,
)
from expertmesh.checkpoint.huggingface.rotary import Rope
from expertmesh.model.spec import ExpertSpec, ModelSpec, RouterSpec


def _spec(config: Config, family: Family) -> ModelSpec:
    rope = Rope.read(config, family.theta)
    bias, tokens = config.flag("attention_bias"), window(config)
    return decoder(
        config,
        rope,
        rope.spec(head_width(config), phi_scales=True),
        grouped(
            config,
            qkv_bias=bias,
            out_bias=bias,
            windows=(tokens,) * layer_count(config),
        ),
        RouterSpec(
            experts=expert_count(config, "num_local_experts"),
            top_k=config.integer("num_experts_per_tok"),
            score="sparsemixer",
            renormalise=False,
            jitter=config.number("router_jitter_noise"),
        ),
        ExpertSpec(width=config.integer("intermediate_size")),
        norm="layernorm",
        head_bias=config.flag("lm_head_bias"),
    )


PHIMOE = Family(
    model_type="phimoe",
    defaults={
        "vocab_size": 32064,
        "hidden_size": 4096,
        "intermediate_size": 6400,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 16,
        "router_jitter_noise": 0.01,
        "attention_bias": False,
        "lm_head_bias": False,
    },
    spec=_spec,
    theta=1_000_000.0,
    remote_code=frozenset(
        {
            "configuration_phimoe.PhiMoEConfig",
            "modeling_phimoe.PhiMoEModel",
            "modeling_phimoe.PhiMoEForCausalLM",
        }
    ),
)
