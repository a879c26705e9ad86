"""DeepSeek-V2 and DeepSeek-V3 (DeepSeek-AI, technical reports of 2024), with multi-head latent attention."""

from __future__ import annotations

from expertmesh.checkpoint.huggingface.config import Config
from expertmesh.checkpoint.huggingface.families.family import Family, decoder, expert_count, layer_count
from expertmesh.checkpoint.huggingface.rotary import Rope
from expertmesh.model.spec import AttentionSpec, DenseSpec, ExpertSpec, ModelSpec, RouterSpec


def _latent(config: Config, rope: Rope) -> AttentionSpec:
    heads = config.integer("num_attention_heads")
    if (config.optional_integer("num_key_value_heads") or heads) != heads:
        raise config.error("num_key_value_heads other than num_attention_heads is not implemented for latent attention")
    config.only("attention_bias", False)
    for derived in ("head_dim", "qk_head_dim"):  # written by transformers, which computes them from the others
        config.value(derived)
    nope, turned = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    return AttentionSpec(
        heads=heads,
        kind="latent",
        head_width=nope,
        value_width=config.integer("v_head_dim"),
        scale=(nope + turned) ** -0.5 * rope.score_factor,
        query_rank=config.optional_integer("q_lora_rank") or 0,
        latent_rank=config.integer("kv_lora_rank"),
    )


def leading_dense(config: Config) -> DenseSpec:
    """The first layers have no experts; in the others `n_shared_experts` are one wide shared one."""
    config.only("moe_layer_freq", 1)
    count = min(config.integer("first_k_dense_replace", minimum=0), layer_count(config))
    shared = config.integer("n_shared_experts", minimum=0) * config.integer("moe_intermediate_size")
    width = config.integer("intermediate_size")
    return DenseSpec(tuple(range(count)), width if count else 0, shared)


def biased_sigmoid(config: Config) -> RouterSpec:
    """The router of DeepSeek-V3, which others took over."""
    config.only("scoring_func", "sigmoid")
    config.only("topk_method", "noaux_tc")
    return RouterSpec(
        experts=expert_count(config, "n_routed_experts"),
        top_k=config.integer("num_experts_per_tok"),
        score="sigmoid",
        renormalise=config.flag("norm_topk_prob"),
        selection_bias=True,
        groups=config.integer("n_group"),
        kept_groups=config.integer("topk_group"),
        group_score="top2",
        scale=config.number("routed_scaling_factor"),
    )


def _softmax(config: Config) -> RouterSpec:
    config.only("scoring_func", "softmax")
    config.value("norm_topk_prob")  # transformers ignores it for this model type, and so do we
    has_groups = config.only("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy"
    for key in ("n_group", "topk_group"):
        config.value(key)
    return RouterSpec(
        experts=expert_count(config, "n_routed_experts"),
        top_k=config.integer("num_experts_per_tok"),
        renormalise=False,
        groups=config.integer("n_group") if has_groups else 1,
        kept_groups=config.integer("topk_group") if has_groups else 1,
        scale=config.number("routed_scaling_factor"),
    )


def _v2(config: Config, family: Family) -> ModelSpec:
    rope = Rope.read(config, family.theta)
    config.only("mlp_bias", False)
    return decoder(
        config,
        rope,
        rope.spec(config.integer("qk_rope_head_dim"), interleaved=True),
        _latent(config, rope),
        _softmax(config),
        ExpertSpec(width=config.integer("moe_intermediate_size")),
        dense=leading_dense(config),
    )


def _v3(config: Config, family: Family) -> ModelSpec:
    rope = Rope.read(config, family.theta)
    return decoder(
        config,
        rope,
        rope.spec(config.integer("qk_rope_head_dim"), interleaved=config.flag("rope_interleave")),
        _latent(config, rope),
        biased_sigmoid(config),
        ExpertSpec(width=config.integer("moe_intermediate_size")),
        dense=leading_dense(config),
    )


def _remote_code(version: str) -> frozenset[str]:
    model = f"modeling_deepseek.Deepseek{version}"
    return frozenset({f"configuration_deepseek.Deepseek{version}Config", f"{model}Model", f"{model}ForCausalLM"})


_COMMON = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
}

DEEPSEEK_V2 = Family(
    model_type="deepseek_v2",
    defaults=_COMMON
    | {
        "vocab_size": 102400,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "moe_intermediate_size": 1407,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "eos_token_id": 2,
        "mlp_bias": False,
        "first_k_dense_replace": 0,
        "n_group": None,
        "topk_group": None,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "num_experts_per_tok": None,
    },
    spec=_v2,
    remote_code=_remote_code("V2"),
)

DEEPSEEK_V3 = Family(
    model_type="deepseek_v3",
    defaults=_COMMON
    | {
        "vocab_size": 129280,
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "max_position_embeddings": 4096,
        "eos_token_id": 1,
        "first_k_dense_replace": 3,
        "n_group": 8,
        "topk_group": 4,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "routed_scaling_factor": 2.5,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "rope_interleave": True,
        "num_nextn_predict_layers": 1,
    },
    spec=_v3,
    has_predictors=True,
    remote_code=_remote_code("V3"),
)
