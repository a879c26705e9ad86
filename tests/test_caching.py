from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from expertmesh.errors import SetupError
from expertmesh.model.cache import BLOCK_TOKENS, KeyValueCache
from expertmesh.serving import caching
from expertmesh.serving.caching import FULL_SEQUENCES, available_bytes, make_leases
from tests.decoders import CPU, PLAIN, full_model

ONE = 4  # blocks of the whole context, 400 tokens
BLOCK_BYTES = KeyValueCache.block_bytes(PLAIN)


def stage(**embedding: Any) -> Any:
    spec = replace(PLAIN, embedding=replace(PLAIN.embedding, **embedding))
    loader = SimpleNamespace(rotary=lambda: full_model("grouped").rotary)
    return SimpleNamespace(spec=spec, device=CPU, loader=loader)


@pytest.mark.parametrize(
    ("kv_tokens", "free_blocks", "blocks"),
    [
        (0, 10**6, FULL_SEQUENCES * ONE),
        (0, 80, 20),
        (0, 8, ONE),
        (400, 10**6, ONE),
        (4 * BLOCK_TOKENS + 1, 10**6, ONE + 1),
        (400, ONE, ONE),
    ],
)
def test_a_cache_is_as_large_as_is_said_or_sensible(
    monkeypatch: pytest.MonkeyPatch, kv_tokens: int, free_blocks: int, blocks: int
) -> None:
    monkeypatch.setattr(caching, "available_bytes", lambda device: free_blocks * BLOCK_BYTES)
    assert make_leases(stage(), kv_tokens, 1.0).free_blocks == blocks


@pytest.mark.parametrize(
    ("kv_tokens", "free_blocks", "what"),
    [
        (384, 10**6, "less than the model's context, 400"),
        (1, 10**6, "less than the model's context, 400"),
        (400, ONE - 1, "does not fit"),
        (0, ONE - 1, "lower --kv-tokens, or split the model with a smaller --context"),
        (10**9, 10**6, "does not fit"),
    ],
)
def test_a_cache_that_is_too_small_or_too_large_ends_the_start(
    monkeypatch: pytest.MonkeyPatch, kv_tokens: int, free_blocks: int, what: str
) -> None:
    monkeypatch.setattr(caching, "available_bytes", lambda device: free_blocks * BLOCK_BYTES)
    with pytest.raises(SetupError, match=what):
        make_leases(stage(), kv_tokens, 1.0)


@pytest.mark.parametrize("embedding", [{"learned_positions": True}, {"bigram_buckets": 7, "bigram_width": 8}])
def test_a_model_whose_embedding_looks_around_cannot_generate(embedding: dict[str, Any]) -> None:
    with pytest.raises(SetupError, match="learned positions or bigrams"):
        make_leases(stage(**embedding), 0, 1.0)


def test_there_is_some_memory() -> None:
    assert available_bytes(CPU) > 2**20
