"""The KV cache of a program: how large it is, and that nothing stays in it for ever."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch

from expertmesh.errors import SetupError
from expertmesh.model.cache import KeyValueCache, blocks_of
from expertmesh.serving.leases import Leases
from expertmesh.serving.stage import Stage
from expertmesh.telemetry.logging import event

FULL_SEQUENCES = 32  # how many sequences of the whole context there is room for, if memory allows
MEMORY_SHARE = 0.25  # of what is available
REAP_EVERY_S = 1.0


def make_leases(stage: Stage, kv_tokens: int, lease_s: float) -> Leases:
    """Makes a stage's KV cache.

    Args:
        stage: Of a model that generates.
        kv_tokens: Tokens that it holds; 0 for as many as are sensible.
        lease_s: How long a sequence may be silent before it is forgotten.

    Raises:
        SetupError: It would not hold one sequence of the whole context, or more than there is memory; or the model's
            embedding looks at more than a token, which a step does not tell it.
    """
    spec = stage.spec
    if spec.embedding.learned_positions or spec.embedding.bigram_buckets:
        raise SetupError("a model with learned positions or bigrams cannot generate: its rows depend on others' places")
    one = blocks_of(spec.context)
    block_bytes = KeyValueCache.block_bytes(spec)
    available = available_bytes(stage.device)
    blocks = blocks_of(kv_tokens)
    if not blocks:
        blocks = max(one, min(FULL_SEQUENCES * one, int(MEMORY_SHARE * available) // block_bytes))
    if blocks < one:
        raise SetupError(f"kv_tokens = {kv_tokens} is less than the model's context, {spec.context}")
    if blocks * block_bytes > available:
        raise SetupError(
            f"a KV cache of {blocks * block_bytes / 2**20:.0f} MiB does not fit {available / 2**20:.0f} MiB;"
            " lower --kv-tokens, or split the model with a smaller --context"
        )
    event("kv_cache", blocks=blocks, bytes=blocks * block_bytes)
    cache = KeyValueCache(spec, blocks, stage.device)
    return Leases(cache, stage.loader.rotary(), spec.layers, lease_s, context=spec.context)


def available_bytes(device: torch.device) -> int:
    """Memory that is free on a device; in a container no more than it may have."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit, used = (Path("/sys/fs/cgroup", name).read_text() for name in ("memory.max", "memory.current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # there is no such group, or no limit
        return free


@asynccontextmanager
async def reaping(leases: Leases | None) -> AsyncIterator[None]:
    """Forgets silent sequences while the context is open."""

    async def reap(leases: Leases) -> None:
        while True:
            await asyncio.sleep(REAP_EVERY_S)
            if forgotten := leases.reap():
                event("sequences_forgotten", number=forgotten)

    task = asyncio.create_task(reap(leases)) if leases is not None else None
    try:
        yield
    finally:
        if task is not None:
            task.cancel()
