"""GLM-4.5 (GLM-4.5 team, "GLM-4.5: Agentic, Reasoning, and Coding Foundation Models", 2025)."""

from __future__ import annotations

from expertmesh.checkpoint.huggingface.config import Config
from expertmesh.checkpoint.huggingface.families.deepseek import biased_sigmoid, leading_dense
from expertmesh.checkpoint.huggingface.families.family import Family, decoder, grouped, head_width
from expertmesh.checkpoint.huggingface.rotary import Rope
from expertmesh.model.spec import ExpertSpec, ModelSpec


def _spec(config: Config, family: Family) -> ModelSpec:
    rope = Rope.read(config, family.theta, fraction=0.5)
    qk_norm = "head" if config.flag("use_qk_norm") else "none"
    return decoder(
        config,
        rope,
        rope.spec(head_width(config)),
        grouped(config, qk_norm=qk_norm, qkv_bias=config.flag("attention_bias")),
        biased_sigmoid(config),
        ExpertSpec(width=config.integer("moe_intermediate_size")),
        dense=leading_dense(config),
    )


GLM4_MOE = Family(
    model_type="glm4_moe",
    defaults={
        "vocab_size": 151552,
        "hidden_size": 4096,
        "intermediate_size": 10944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "eos_token_id": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "num_experts_per_tok": 8,
        "n_routed_experts": 128,
        "n_shared_experts": 1,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "use_qk_norm": False,
        "num_nextn_predict_layers": 1,
    },
    spec=_spec,
    has_predictors=True,
)
