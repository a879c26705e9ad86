"""Mixtral (Jiang et al., "Mixtral of Experts", 2024)."""

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
    tokens = window(config)
    config.value("router_jitter_noise")  # of training only
    return decoder(
        config,
        rope,
        rope.spec(head_width(config)),
        grouped(config, windows=(tokens,) * layer_count(config)),
        RouterSpec(experts=expert_count(config, "num_local_experts"), top_k=config.integer("num_experts_per_tok")),
        ExpertSpec(width=config.integer("intermediate_size")),
    )


MIXTRAL = Family(
    model_type="mixtral",
    defaults={
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
        "sliding_window": None,
        "num_experts_per_tok": 2,
        "num_local_experts": 8,
    },
    spec=_spec,
    theta=1_000_000.0,
)
