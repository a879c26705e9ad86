"""Rotary frequencies, bit by bit those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expertmesh.checkpoint.huggingface.config import Config
from expertmesh.checkpoint.huggingface.rotary import Rope
from expertmesh.errors import BadCheckpoint

CONTEXT, WIDTH = 4096, 32
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 512,
}
LONG = {
    "rope_type": "longrope",
    "short_factor": [1 + 0.1 * i for i in range(WIDTH // 2)],
    "long_factor": [1.0 + i for i in range(WIDTH // 2)],
    "original_max_position_embeddings": 1024,
}


def ours(parameters: dict[str, Any], context: int | None = None) -> tuple[list[float], float]:
    config = Config({"max_position_embeddings": CONTEXT, "rope_parameters": parameters}, "config.json", context)
    spec = Rope.read(config, 10_000.0).spec(WIDTH)
    return list(spec.frequencies), spec.magnitude


def theirs(parameters: dict[str, Any], length: int | None = None) -> tuple[list[float], float]:
    from transformers import MixtralConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding

    config = MixtralConfig(head_dim=WIDTH, max_position_embeddings=CONTEXT, rope_parameters=dict(parameters))
    if parameters["rope_type"] == "default":
        frequencies, magnitude = MixtralRotaryEmbedding.compute_default_rope_parameters(config)
    else:
        frequencies, magnitude = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, seq_len=length)
    assert frequencies.dtype == torch.float32
    return frequencies.tolist(), magnitude


@pytest.mark.parametrize("theta", [10_000, 1_000_000.0, 150_000.5])
@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        LLAMA3,
        LLAMA3 | {"factor": 32.0, "high_freq_factor": 2.5, "original_max_position_embeddings": 2048},
        YARN,
        YARN | {"factor": 0.5},
        YARN | {"truncate": False},
        YARN | {"beta_fast": 20.0, "beta_slow": 2},
        YARN | {"mscale": 0.7, "mscale_all_dim": 1.2},
        YARN | {"mscale": 0.7},
        YARN | {"attention_factor": 1.7},
        YARN | {"factor": None},
        {"rope_type": "yarn", "factor": 4.0},
        LONG,
        LONG | {"factor": 2.0},
        LONG | {"attention_factor": 1.2},
    ],
)
def test_frequencies_and_magnitude_have_the_bits_of_transformers(parameters: dict[str, Any], theta: float) -> None:
    given = parameters | {"rope_theta": theta}
    assert ours(given) == theirs(given)


def test_a_context_beyond_the_original_has_the_long_factors() -> None:
    given = LONG | {"rope_theta": 10_000.0}
    assert ours(given, 1024) == ours(given) == theirs(given, 1024)
    assert ours(given, 1025) == theirs(given, 1025) != ours(given)


@pytest.mark.parametrize("key", ["rope_type", "type"])
@pytest.mark.parametrize("context", [1024, 1025])
def test_longrope_by_its_old_name(key: str, context: int) -> None:
    given = {name: value for name, value in LONG.items() if name != "rope_type"} | {"rope_theta": 10_000.0}
    assert ours(given | {key: "su"}, context) == theirs(given | {"rope_type": "longrope"}, context)


@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_the_old_name_keeps_to_the_original_context(key: str) -> None:
    scaling = {name: value for name, value in LONG.items() if name != "rope_type"} | {key: "su"}
    config = Config({"max_position_embeddings": CONTEXT, "rope_scaling": scaling}, "config.json", None)
    assert Rope.read(config, 10_000.0).context == 1024


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic' is not implemented"),
        ({"rope_type": "su"}, "longrope needs 16 numbers in short_factor"),
        ({"rope_type": ["yarn"]}, "rope_type"),
        ({"rope_type": "default", "factor": 2.0}, "not understood: factor"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "linear", "factor": 0}, "factor"),
        ({"rope_type": "linear", "factor": "2"}, "factor"),
        (YARN | {"rope_theta": 0.5}, "rope_theta"),
        (YARN | {"rope_theta": float("inf")}, "rope_theta"),
        (YARN | {"original_max_position_embeddings": 0}, "original_max_position_embeddings"),
        (YARN | {"beta_fast": -1}, "beta_fast"),
        (LLAMA3 | {"low_freq_factor": 4.0}, "low_freq_factor"),
        (LONG | {"short_factor": [1.0]}, "short_factor"),
        (LONG | {"short_factor": [0.0] * (WIDTH // 2)}, "short_factor"),
        (LONG | {"short_factor": "1" * (WIDTH // 2)}, "short_factor"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"full_attention": {"rope_type": "default"}}, "not understood: full_attention"),
    ],
)
def test_parameters_that_cannot_be_are_refused_by_name(parameters: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadCheckpoint, match=reason):
        ours(parameters)
