"""Tiny random Hugging Face checkpoints of every model type that can be imported, and what transformers makes of them.

Everything is made once a process and kept in a scratch folder. Copy a folder before you change it.
"""

from __future__ import annotations

import copy
import functools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from expertmesh.checkpoint.split import split
from tests import tiny

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIALS = ["<pad>", "<s>", "</s>"]
VOCAB, WIDTH, EXPERTS, LENGTH = 264, 32, 4, 24
REFERENCE_FILE = "reference.npz"

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 96,
    "rms_norm_eps": 3e-3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
_YARN = {"rope_type": "yarn", "rope_theta": 5000.0, "factor": 4.0, "original_max_position_embeddings": 24}
_LATENT = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "intermediate_size": 40,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 6,
    "v_head_dim": 10,
}
_PHI_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 5000.0,
    "original_max_position_embeddings": 48,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 2.0, 4.0, 8.0],
    "short_mscale": 1.1,
    "long_mscale": 1.3,
}

# Model type and configuration of each checkpoint.
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"intermediate_size": 24, "num_local_experts": EXPERTS}),
    "mixtral_window": (
        "mixtral",
        {"intermediate_size": 24, "num_local_experts": EXPERTS, "sliding_window": 5, "head_dim": 12},
    ),
    "mixtral_llama3": (
        "mixtral",
        {
            "intermediate_size": 24,
            "num_local_experts": EXPERTS,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 24,
            },
        },
    ),
    "olmoe": ("olmoe", {"intermediate_size": 24, "num_experts": EXPERTS, "num_key_value_heads": 4}),
    "olmoe_clip": (
        "olmoe",
        {"intermediate_size": 24, "num_experts": EXPERTS, "clip_qkv": 0.8, "attention_bias": True},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        {
            "num_hidden_layers": 3,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_experts": EXPERTS,
            "shared_expert_intermediate_size": 20,
            "mlp_only_layers": [1],
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 1,
        },
    ),
    "qwen2_moe_step": (
        "qwen2_moe",
        {
            "num_hidden_layers": 4,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_experts": EXPERTS,
            "shared_expert_intermediate_size": 20,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "qkv_bias": False,
        },
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "num_experts": EXPERTS,
            "head_dim": 12,
            "norm_topk_prob": True,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 7,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 2.0},
        },
    ),
    "deepseek_v2": (
        "deepseek_v2",
        _LATENT
        | {
            "n_shared_experts": 2,
            "q_lora_rank": None,
            "norm_topk_prob": True,
            "rope_parameters": _YARN | {"mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    "deepseek_v2_groups": (
        "deepseek_v2",
        _LATENT
        | {
            "n_shared_experts": 1,
            "q_lora_rank": 16,
            "topk_method": "group_limited_greedy",
            "n_group": 2,
            "topk_group": 1,
            "routed_scaling_factor": 1.5,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        _LATENT
        | {
            "n_shared_experts": 1,
            "q_lora_rank": 16,
            "n_group": 4,
            "topk_group": 2,
            "num_mtp_layers": 0,
            "rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 0.6},
        },
    ),
    "deepseek_v3_halves": (
        "deepseek_v3",
        _LATENT
        | {
            "n_shared_experts": 1,
            "q_lora_rank": None,
            "n_group": 1,
            "topk_group": 1,
            "rope_interleave": False,
            "norm_topk_prob": False,
            "num_mtp_layers": 0,
        },
    ),
    "glm4_moe": (
        "glm4_moe",
        {
            "num_hidden_layers": 3,
            "intermediate_size": 40,
            "moe_intermediate_size": 24,
            "n_routed_experts": EXPERTS,
            "head_dim": 16,
            "use_qk_norm": True,
            "attention_bias": True,
            "routed_scaling_factor": 1.5,
            "num_mtp_layers": 0,
        },
    ),
    "granitemoe": (
        "granitemoe",
        {
            "intermediate_size": 24,
            "num_local_experts": EXPERTS,
            "tie_word_embeddings": True,
            "embedding_multiplier": 0.7,
            "residual_multiplier": 1.3,
            "attention_multiplier": 0.25,
            "logits_scaling": 2.0,
        },
    ),
    "phimoe": (
        "phimoe",
        {
            "intermediate_size": 24,
            "num_local_experts": EXPERTS,
            "attention_bias": True,
            "lm_head_bias": True,
            "rope_parameters": _PHI_ROPE,
        },
    ),
    "gpt_oss": (
        "gpt_oss",
        {
            "intermediate_size": WIDTH,  # square, so that shapes do not tell a matrix from its transpose
            "num_local_experts": EXPERTS,
            "head_dim": 8,
            "sliding_window": 5,
            "swiglu_limit": 0.8,
            "rope_parameters": _YARN | {"truncate": False},
        },
    ),
}
QUANTISED = "gpt_oss_mxfp4"
LAYOUTS = ("hub", "fused")
ALL = [(name, layout) for name in CHECKPOINTS for layout in LAYOUTS] + [(QUANTISED, "hub")]


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer of `VOCAB` ids at most."""
    vocab = {token: id_ for id_, token in enumerate([*SPECIALS, *BYTES])}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIALS)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))


@functools.cache
def checkpoint(name: str, layout: str = "hub") -> Path:
    """A checkpoint's folder; that of the `hub` layout also holds the reference."""
    _build(name.removesuffix("_mxfp4"), name == QUANTISED)
    return _folder(name, layout)


@functools.cache
def model(name: str, layout: str = "hub") -> Path:
    """The checkpoint, split."""
    folder = _root() / "split" / f"{name}-{layout}"
    split(checkpoint(name, layout), folder)
    return folder


@functools.cache
def reference(name: str) -> dict[str, np.ndarray]:
    """What transformers computes: `input_ids`, `logits`, `hidden_states`, `route_{i}_index`, `route_{i}_weight`."""
    with np.load(checkpoint(name) / REFERENCE_FILE) as arrays:
        return dict(arrays)


@functools.cache
def _root() -> Path:
    return tiny.scratch()


def _folder(name: str, layout: str) -> Path:
    return _root() / name / layout


@functools.cache
def _build(name: str, quantised: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of another library, about itself
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        model_type, more = CHECKPOINTS[name]
        config = AutoConfig.for_model(model_type, **copy.deepcopy(_BASE | more))  # which it changes
        config._attn_implementation = config._experts_implementation = "eager"
        network = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        generator = torch.Generator().manual_seed(20 + len(name))
        _randomise(network, generator)
        label = QUANTISED if quantised else name
        blocks = _quantise(network, generator) if quantised else {}
        for layout in LAYOUTS[:1] if quantised else LAYOUTS:
            folder = _folder(label, layout)
            folder.mkdir(parents=True)
            network.save_pretrained(folder, save_original_format=layout == "hub")
            write_tokenizer(folder)
            if quantised:
                _store_quantised(folder, blocks)
        np.savez(_folder(label, "hub") / REFERENCE_FILE, **_reference(network))


def _randomise(network: Any, generator: torch.Generator) -> None:
    """Weights that leave no difference unseen: norms are not 1, biases not 0, routers not flat."""
    with torch.no_grad():
        for name, value in [*network.named_parameters(), *network.named_buffers()]:
            noise = torch.randn(value.shape, generator=generator)
            if "rotary" in name:
                continue
            if "norm" in name and name.endswith("weight"):
                value.copy_(1 + 0.3 * noise)
            elif value.dim() == 1 or name.endswith("_bias"):
                value.copy_(0.3 * noise)
            else:
                value.copy_(noise * (1.0 if "embed" in name else 1.6 / WIDTH**0.5))


@torch.no_grad()
def _reference(network: Any) -> dict[str, np.ndarray]:
    routes: list[tuple[Tensor, Tensor]] = []
    for module in network.modules():
        if type(module).__name__.endswith("Router"):
            module.register_forward_hook(lambda module, given, result: routes.append((result[2], result[1])))
    ids = torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(4))
    result = network(input_ids=ids, output_hidden_states=True)
    arrays = {
        "input_ids": ids.numpy(),
        "logits": result.logits.numpy(),
        "hidden_states": torch.stack(result.hidden_states).numpy(),
    }
    for number, (indices, weights) in enumerate(routes):
        arrays |= {f"route_{number}_index": indices.numpy(), f"route_{number}_weight": weights.numpy()}
    return arrays


_FP4 = [sign * number for sign in (1, -1) for number in (0, 0.5, 1, 1.5, 2, 3, 4, 6)]


def _quantise(network: Any, generator: torch.Generator) -> dict[str, Tensor]:
    """Draws MXFP4 blocks for the experts' matrices, and gives the network the numbers that they stand for."""
    stored = {}
    with torch.no_grad():
        for name, value in network.named_parameters():
            if not name.endswith(("gate_up_proj", "down_proj")):
                value.copy_(value.bfloat16())
                continue
            experts, columns, rows = value.shape
            halves = torch.randint(0, 16, (experts, rows, columns), generator=generator)
            scales = torch.randint(122, 126, (experts, rows, columns // 32), generator=generator)
            numbers = torch.tensor(_FP4)[halves] * torch.exp2(scales.repeat_interleave(32, -1) - 127.0)
            value.copy_(numbers.transpose(1, 2))
            pairs = halves.view(experts, rows, columns // 32, 16, 2)
            stored[f"{name}_blocks"] = (pairs[..., 0] + 16 * pairs[..., 1]).to(torch.uint8)
            stored[f"{name}_scales"] = scales.to(torch.uint8)
    return stored


def _store_quantised(folder: Path, blocks: dict[str, Tensor]) -> None:
    path = folder / "model.safetensors"
    tensors = {
        name: value.bfloat16()
        for name, value in safetensors.torch.load(path.read_bytes()).items()
        if f"{name}_blocks" not in blocks
    }
    path.write_bytes(safetensors.torch.save(tensors | blocks))
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    (folder / "config.json").write_text(json.dumps(config))
