"""A tiny model with random weights, as a checkpoint and split, and servers to put its stages behind."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import safetensors.torch
import torch

from expertmesh import wire
from expertmesh.checkpoint.load import StageLoader
from expertmesh.checkpoint.split import SPEC_FILE, WEIGHTS_FILE, split
from expertmesh.model.full import FullModel
from expertmesh.model.spec import AttentionSpec, EmbeddingSpec, ExpertSpec, HeadSpec, ModelSpec, RouterSpec
from expertmesh.rpc.channel import message_limits
from expertmesh.rpc.interceptor import CallInterceptor
from expertmesh.rpc.settings import ModelSettings
from expertmesh.serving.stage import Stage
from expertmesh.train.config import TokenizerConfig
from expertmesh.train.vocabulary import make_tokenizer
from expertmesh.v1.tensor_pb2 import Tensor

NAME = "tiny"
WIDTH, LAYERS, EXPERTS, CONTEXT = 32, 2, 4, 48
LABELS = ("world", "sports", "business", "science")
SENTENCES = (
    "Stocks rose sharply on Monday as oil prices fell for the third day.",
    "The team won the final match after extra time in front of a large crowd.",
    "Scientists found water on a distant planet, a report said on Friday.",
    "Ministers of seven countries will meet in Geneva to talk about trade.",
    "The company said its profit doubled in the last quarter of the year.",
    "A storm closed schools and airports across the northern states.",
    "The new phone has a faster chip and a camera that works in the dark.",
    "Voters go to the polls on Sunday to choose a new president.",
)


def scratch() -> Path:
    """A folder with a short path (sockets need that) that goes away with the process."""
    folder = Path(tempfile.mkdtemp(prefix="em-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@functools.cache
def checkpoint() -> Path:
    """A trained checkpoint's folder, but for the training. Copy it before you change it."""
    folder = scratch() / NAME
    tokenizer = make_tokenizer(SENTENCES, TokenizerConfig(), 200, folder / "tokenizer")
    spec = ModelSpec(
        width=WIDTH,
        layers=LAYERS,
        context=CONTEXT,
        embedding=EmbeddingSpec(vocab=tokenizer.vocab, bigram_buckets=61, bigram_width=8),
        attention=AttentionSpec(heads=4),
        router=RouterSpec(experts=EXPERTS, top_k=2),
        expert=ExpertSpec(width=24),
        head=HeadSpec(labels=LABELS),
    )
    with torch.random.fork_rng():
        torch.manual_seed(7)
        weights = FullModel(spec).state_dict()
    (folder / SPEC_FILE).write_text(json.dumps(spec.to_dict()))
    safetensors.torch.save_file({name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS_FILE)
    return folder


@functools.cache
def model() -> Path:
    """The checkpoint, split. Copy it before you change it."""
    folder = scratch() / "split"
    split(checkpoint(), folder)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, target))


def stage(kind: str, folder: Path | None = None) -> Stage:
    """The device side of a service."""
    return Stage(kind, ModelSettings(model=folder or model()))


@functools.cache
def full_model() -> FullModel:
    """The whole model, whose stages are what services are compared with."""
    return StageLoader(model(), torch.device("cpu")).full_model()


def random_rows(count: int, seed: int = 0) -> np.ndarray:
    """Rows [count, WIDTH] in float32."""
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


@asynccontextmanager
async def served(
    *registrations: tuple[Callable[[Any, grpc.aio.Server], None], Any],
    address: str = "127.0.0.1:0",
    guarded: bool = True,
    max_message_bytes: int = 2**20,
) -> AsyncIterator[str]:
    """A server of this loop.

    Args:
        registrations: Pairs of a generated `add_…_to_server` and an implementation.
        address: Where to listen.
        guarded: Whether the product's interceptor is in place; doubles answer without it.
        max_message_bytes: Largest message accepted.
    """
    server = grpc.aio.server(
        interceptors=[CallInterceptor()] if guarded else None,
        options=(("grpc.so_reuseport", 0), *message_limits(max_message_bytes)),
    )
    for add, implementation in registrations:
        add(implementation, server)
    port = server.add_insecure_port(address)
    await server.start()
    try:
        yield address if address.startswith("unix:") else f"{address.rpartition(':')[0]}:{port}"
    finally:
        await server.stop(None)


def wire_ids(*values: int) -> Tensor:
    """An int32 tensor as it goes over the wire."""
    return wire.encode(np.array(values, np.int32))
