"""`config.json` of every model type: defaults, both generations of it, and what is refused."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
from typing import Any

import pytest

from expertmesh.checkpoint.huggingface.config import MAX_INTEGER, SYNONYMS, Config
from expertmesh.checkpoint.huggingface.families import FAMILIES
from expertmesh.checkpoint.huggingface.irrelevant import IRRELEVANT
from expertmesh.checkpoint.huggingface.source import read_model
from expertmesh.errors import BadCheckpoint
from expertmesh.model.spec import ModelSpec
from tests import families

# Keys that are read and do not change the spec: written for others, unused by transformers, or of training only.
_LATENT = {"head_dim", "qk_head_dim"}
WITHOUT_EFFECT = {
    "mixtral": {"router_jitter_noise"},
    "mixtral_window": {"router_jitter_noise"},
    "mixtral_llama3": {"router_jitter_noise"},
    "qwen2_moe": {"max_window_layers"},  # it stands behind layer_types
    "qwen2_moe_step": {"max_window_layers", "use_sliding_window", "sliding_window"},
    "qwen3_moe": {"intermediate_size"},  # no layer is dense
    "deepseek_v2": _LATENT | {"norm_topk_prob"},
    "deepseek_v2_groups": _LATENT | {"norm_topk_prob"},
    "deepseek_v3": _LATENT | {"num_nextn_predict_layers"},
    "deepseek_v3_halves": _LATENT | {"num_nextn_predict_layers"},
    "glm4_moe": {"num_nextn_predict_layers"},
    "phimoe": {"max_position_embeddings"},  # the original context is shorter
}


def values_of(name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((families.checkpoint(name) / "config.json").read_text())
    return values


def spec_of(values: dict[str, Any], context: int | None = None) -> ModelSpec:
    return read_model(Config(values, "config.json", context))[1]


def transformers_class(model_type: str) -> Any:
    from transformers import AutoConfig

    return type(AutoConfig.for_model(model_type))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(transformers_class(model_type))}
    family = FAMILIES[model_type]
    for key, default in family.defaults.items():
        names = next((synonyms for synonyms in SYNONYMS if key in synonyms), (key,))
        name = next((name for name in names if name in theirs), None)
        assert name is not None, f"{key} is no key of {model_type}"
        if key != "rope_parameters":  # which is set later, see the next test
            assert theirs[name] == default, key
    assert transformers_class(model_type).default_theta == family.theta


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_file_that_says_nothing_means_what_transformers_makes_of_it(model_type: str) -> None:
    unset = {"deepseek_v2": {"num_experts_per_tok": 6}, "glm4_moe": {"head_dim": 128}}  # have no default that can be
    more = unset.get(model_type, {})
    written = transformers_class(model_type)(**more).to_dict()
    assert spec_of({"model_type": model_type, **more}) == spec_of({"model_type": model_type, **written})


@pytest.mark.parametrize("name", families.CHECKPOINTS)
def test_files_of_the_older_generation_mean_the_same(name: str) -> None:
    values = values_of(name)
    older = copy.deepcopy(values)
    older["torch_dtype"] = older.pop("dtype")
    rope = older.pop("rope_parameters")
    older["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    rope["type"] = rope.pop("rope_type")
    older["rope_scaling"] = None if rope["type"] == "default" else rope
    assert spec_of(older) == spec_of(values)


@pytest.mark.parametrize("name", families.CHECKPOINTS)
def test_every_key_that_is_read_decides_something(name: str) -> None:
    values = values_of(name)
    spec, unchanged = spec_of(values), set()
    for key, value in values.items():
        if key in IRRELEVANT or isinstance(value, list | dict | str | None):
            continue
        with contextlib.suppress(BadCheckpoint):  # which is an effect too
            if spec_of(values | {key: not value if isinstance(value, bool) else value + 1}) == spec:
                unchanged.add(key)
    assert unchanged == {"tie_word_embeddings"} | WITHOUT_EFFECT.get(name, set())


@pytest.mark.parametrize("name", families.CHECKPOINTS)
@pytest.mark.parametrize("value", [-1, 0, 2**31, 10**400, 1.5, "64", [], {}, True])
def test_sizes_that_cannot_be_are_refused_by_name(name: str, value: Any) -> None:
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings"):
        with pytest.raises(BadCheckpoint, match=key):
            spec_of(values_of(name) | {key: value})


@pytest.mark.parametrize(
    ("name", "edit", "reason"),
    [
        ("mixtral", {"model_type": "llama"}, "'llama' is not implemented; implemented: deepseek_v2, deepseek_v3"),
        ("mixtral", {"model_type": ["mixtral"]}, "model_type"),
        ("mixtral", {"model_type": None}, "model_type"),
        ("mixtral", {"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config.*'gptq'"),
        ("mixtral", {"quantization_config": {"quant_method": "mxfp4"}}, "quantization_config"),
        ("deepseek_v3", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.*'fp8'"),
        ("gpt_oss", {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.*'fp8'"),
        ("mixtral", {"auto_map": {"AutoModelForCausalLM": "modeling_evil.Evil"}}, "auto_map.*'modeling_evil.Evil'"),
        ("deepseek_v2", {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}}, "auto_map"),
        ("mixtral", {"auto_map": "modeling_evil"}, "auto_map"),
        ("mixtral", {"trust_remote_code": True}, "trust_remote_code"),
        ("mixtral", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("mixtral", {"attention_sink_size": 4}, "attention_sink_size = 4 is not understood"),
        ("mixtral", {"use_sliding_chunks": False}, "use_sliding_chunks"),
        ("mixtral", {"is_encoder_decoder": True}, "is_encoder_decoder"),
        ("mixtral", {"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ("mixtral", {"num_experts": 5}, "num_local_experts and num_experts"),
        ("mixtral", {"num_experts_per_tok": 5}, "router.top_k"),
        ("mixtral", {"num_key_value_heads": 3}, "kv_heads"),
        ("mixtral", {"num_hidden_layers": 1000}, "num_hidden_layers = 1000"),
        ("mixtral", {"num_local_experts": 1000}, "num_local_experts = 1000"),
        ("mixtral", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ("mixtral", {"rms_norm_eps": 0}, "norm.eps"),
        ("mixtral", {"sliding_window": -4}, "sliding_window"),
        ("mixtral", {"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ("mixtral", {"head_dim": 7}, "rotated in pairs"),
        ("mixtral", {"head_dim": MAX_INTEGER - 1}, "rotated in pairs"),
        ("olmoe", {"clip_qkv": 0}, "clip_qkv"),
        ("olmoe", {"norm_topk_prob": None}, "norm_topk_prob"),
        ("qwen2_moe", {"layer_types": ["full_attention"]}, "layer_types"),
        ("qwen2_moe", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "chunked_attention"),
        ("qwen2_moe", {"sliding_window": None}, "sliding_window"),
        ("qwen2_moe", {"mlp_only_layers": ["1"]}, "mlp_only_layers"),
        ("deepseek_v2", {"attention_bias": True}, "attention_bias"),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method"),
        ("deepseek_v2", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("deepseek_v2", {"moe_layer_freq": 2}, "moe_layer_freq"),
        ("deepseek_v3", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func"),
        ("deepseek_v3", {"n_group": 3}, "router.groups"),
        ("deepseek_v3", {"n_group": None}, "n_group"),
        ("granitemoe", {"attention_multiplier": -1.0}, "attention_multiplier"),
        ("granitemoe", {"logits_scaling": 0}, "head.divisor"),
        ("phimoe", {"num_experts_per_tok": 3}, "sparsemixer"),
        ("gpt_oss", {"experts_per_token": 3}, "num_experts_per_tok and experts_per_token"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(name: str, edit: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadCheckpoint, match=reason):
        spec_of(values_of(name) | edit)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("mixtral", {"some_new_key": None}),
        ("mixtral", {"_commit_hash": "abc"}),
        ("mixtral", {"id2label": {"0": "a"}, "max_length": 20, "torchscript": False, "tokenizer_class": "Llama"}),
        ("mixtral", {"sliding_window": 0}),
        ("mixtral", {"hidden_act": "swish"}),
        ("deepseek_v2", {"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"}}),
        ("deepseek_v2", {"moe_layer_freq": 1, "scoring_func": "softmax", "aux_loss_alpha": 0.001, "seq_aux": True}),
        ("deepseek_v3", {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "ep_size": 1, "moe_layer_freq": 1}),
        ("gpt_oss", {"experts_per_token": 2, "initial_context_length": 4096}),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}),
    ],
)
def test_what_does_not_matter_passes(name: str, edit: dict[str, Any]) -> None:
    assert spec_of(values_of(name) | edit) == spec_of(values_of(name))


def test_a_window_that_no_sequence_outgrows_is_none() -> None:
    values = values_of("mixtral")
    assert spec_of(values | {"sliding_window": 96}).attention.windows == ()
    assert spec_of(values | {"sliding_window": 95}).attention.windows == (95, 95)
    assert spec_of(values | {"sliding_window": 95}, context=50).attention.windows == ()


def test_the_context_can_be_smaller_than_the_models_but_not_larger() -> None:
    assert spec_of(values_of("mixtral")).context == 96
    assert spec_of(values_of("mixtral"), context=10).context == 10
    for context in (97, 0, -1):
        with pytest.raises(BadCheckpoint, match="at most 96"):
            spec_of(values_of("mixtral"), context=context)


def test_longrope_has_the_original_context_unless_more_is_asked_for() -> None:
    values = values_of("phimoe")
    short, same, longer = (spec_of(values, context) for context in (None, 48, 49))
    assert (short.context, same.context, longer.context) == (48, 48, 49)
    assert short.rotary == same.rotary
    assert short.rotary.frequencies[-1] == pytest.approx(5000**-0.75 / 1.3)
    assert longer.rotary.frequencies[-1] == pytest.approx(5000**-0.75 / 8)
    assert (short.rotary.magnitude, longer.rotary.magnitude) == (1.1, 1.3)
    with pytest.raises(BadCheckpoint, match="at most 96"):
        spec_of(values, context=97)
