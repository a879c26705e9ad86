"""Small language models with random weights: together they turn every switch of a spec that a decoder has."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from expertmesh.model.cache import KeyValueCache, blocks_of
from expertmesh.model.cached_sequences import CachedSequences
from expertmesh.model.full import FullModel
from expertmesh.model.layers import DTYPES, LayerNorm, RMSNorm, arrange, narrow
from expertmesh.model.spec import (
    AttentionSpec,
    DenseSpec,
    EmbeddingSpec,
    ExpertSpec,
    HeadSpec,
    ModelSpec,
    NormSpec,
    RotarySpec,
    RouterSpec,
)
from expertmesh.model.tiles import Span

VOCAB, CONTEXT = 97, 400
CPU = torch.device("cpu")


def frequencies(pairs: int, theta: float = 10_000.0) -> tuple[float, ...]:
    """Angles per position of `pairs` pairs, as RoFormer has them."""
    return tuple(theta ** (-pair / pairs) for pair in range(pairs))


# An epsilon that is large on purpose: one that is forgotten shows.
PLAIN = ModelSpec(
    width=48,
    layers=2,
    context=CONTEXT,
    embedding=EmbeddingSpec(VOCAB, learned_positions=False),
    attention=AttentionSpec(heads=4, kind="grouped", kv_heads=2, head_width=12),
    router=RouterSpec(experts=8, top_k=2),
    expert=ExpertSpec(width=36),  # no multiple of a vector
    head=HeadSpec(kind="language", end_ids=(2,)),
    norm=NormSpec(1e-3, "rms"),
    rotary=RotarySpec(frequencies(6)),
)
LATENT = replace(
    PLAIN,
    attention=AttentionSpec(
        heads=4, kind="latent", head_width=12, value_width=10, query_rank=20, latent_rank=18, latent_eps=1e-2
    ),
    rotary=RotarySpec(frequencies(4), interleaved=True),
)


def _attention(**switches: Any) -> ModelSpec:
    return replace(PLAIN, attention=replace(PLAIN.attention, **switches))


def _router(**switches: Any) -> ModelSpec:
    return replace(PLAIN, router=replace(PLAIN.router, **switches))


SPECS: dict[str, ModelSpec] = {
    "grouped": PLAIN,
    "multi-head": _attention(kv_heads=4),
    "multi-query": _attention(kv_heads=1),
    "three query heads to a key head": _attention(heads=6, kv_heads=2),
    "scale": _attention(scale=0.11),
    "window": _attention(windows=(150, 150)),
    "narrow window": _attention(windows=(5, 5)),
    "alternating windows": _attention(windows=(20, 0)),
    "sinks": _attention(sinks=True),
    "qk norm of a head": _attention(qk_norm="head"),
    "flat qk norm": _attention(qk_norm="flat"),
    "clip": _attention(clip=0.7),
    "flat qk norm and clip": _attention(qk_norm="flat", clip=0.7),
    "biases of attention": _attention(qkv_bias=True, out_bias=True),
    "partial rotary": replace(PLAIN, rotary=RotarySpec(frequencies(3))),
    "interleaved": replace(PLAIN, rotary=RotarySpec(frequencies(6), interleaved=True)),
    "magnitude": replace(PLAIN, rotary=RotarySpec(frequencies(6), magnitude=1.3)),
    "no rotation": replace(PLAIN, rotary=RotarySpec()),
    "latent": LATENT,
    "latent without query rank": replace(LATENT, attention=replace(LATENT.attention, query_rank=0, scale=0.17)),
    "softmax": _router(top_k=3),
    "softmax of the best": _router(score="softmax_top", top_k=3),
    "sigmoid": _router(score="sigmoid", top_k=3),
    "sparsemixer": _router(score="sparsemixer", jitter=0.2),
    "raw weights": _router(top_k=3, renormalise=False),
    "raw sigmoid": _router(score="sigmoid", top_k=3, renormalise=False),
    "biased router": _router(score="softmax_top", bias=True),
    "groups by max": _router(groups=4, kept_groups=2, group_score="max", top_k=3, renormalise=False, scale=2.0),
    "groups by top2": _router(
        score="sigmoid", groups=2, kept_groups=1, group_score="top2", top_k=3, selection_bias=True, scale=2.5
    ),
    "selection bias": _router(score="sigmoid", top_k=3, selection_bias=True),
    "one expert each": _router(top_k=1),
    "dense layers": replace(PLAIN, layers=3, dense=DenseSpec(layers=(0, 2), width=52)),
    "only dense layers": replace(PLAIN, dense=DenseSpec(layers=(0, 1), width=52)),
    "shared expert": replace(PLAIN, dense=DenseSpec(shared_width=28)),
    "gated shared expert": replace(PLAIN, dense=DenseSpec(shared_width=28, shared_gate=True)),
    "dense layer and shared expert": replace(
        LATENT,
        dense=DenseSpec(layers=(0,), width=52, shared_width=28),
        router=replace(
            PLAIN.router, score="sigmoid", groups=4, kept_groups=2, group_score="top2", selection_bias=True, scale=2.5
        ),
    ),
    "clamped": replace(PLAIN, expert=ExpertSpec(36, "swiglu_clamped", limit=0.8, alpha=1.702, bias=True)),
    "biases of experts": replace(PLAIN, expert=ExpertSpec(36, bias=True)),
    "layer norm": replace(PLAIN, norm=NormSpec(1e-3, "layernorm")),
    "multipliers": replace(
        PLAIN,
        embedding=replace(PLAIN.embedding, multiplier=3.0),
        residual_multiplier=0.4,
        head=replace(PLAIN.head, divisor=0.6),
    ),
    "biased head": replace(PLAIN, head=replace(PLAIN.head, bias=True)),
    "learned positions": replace(
        PLAIN, embedding=EmbeddingSpec(VOCAB, bigram_buckets=0, learned_positions=True), rotary=RotarySpec()
    ),
    "odd sizes": replace(
        PLAIN,
        width=51,
        attention=AttentionSpec(heads=3, kind="grouped", kv_heads=1, head_width=14),
        expert=ExpertSpec(37),
        rotary=RotarySpec(frequencies(5)),
        embedding=EmbeddingSpec(89, learned_positions=False),
    ),
    "clamped with windows and sinks": replace(
        PLAIN,
        attention=replace(PLAIN.attention, windows=(128, 0), sinks=True, qkv_bias=True, out_bias=True),
        router=replace(PLAIN.router, score="softmax_top", bias=True, top_k=4),
        expert=ExpertSpec(36, "swiglu_clamped", limit=0.8, bias=True),
    ),
}
SPECS |= {f"{name} in bfloat16": replace(SPECS[name], dtype="bfloat16") for name in ("grouped", "latent", "layer norm")}


@functools.cache
def full_model(name: str) -> FullModel:
    """One of `SPECS` with random weights, arranged as services have them. Do not change it; see `random_model`."""
    return arrange(random_model(SPECS[name]))


def random_model(spec: ModelSpec, seed: int = 0) -> FullModel:
    """A model with random weights of which none is a neutral 0 or 1, in the spec's dtype."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = FullModel(spec)
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                nn.init.normal_(parameter, *_distribution(module, name, parameter))
    return narrow(model.eval().requires_grad_(False), DTYPES[spec.dtype])


def _distribution(module: nn.Module, name: str, parameter: Tensor) -> tuple[float, float]:
    """Mean and standard deviation."""
    match module:
        case RMSNorm() | LayerNorm():
            return (1.0, 0.3) if name == "weight" else (0.0, 0.3)
        case nn.Linear() if name == "weight":
            return 0.0, 1.5 / parameter.shape[1] ** 0.5
        case nn.Embedding():
            return 0.0, 0.3
    return 0.0, 0.5  # biases, sinks


def texts(lengths: Sequence[int], seed: int = 0, vocab: int = 89) -> list[Tensor]:
    """Random token ids, one tensor for each length."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab, (length,), generator=generator) for length in lengths]


def whole_logits(model: FullModel, ids_T: Tensor) -> Tensor:
    """Logits [T, V] of one sequence computed alone and whole."""
    return model.logits(ids_T.to(model.device), torch.tensor([len(ids_T)]))


class Serving:
    """A model whose sequences are computed in steps, each in blocks of a cache that holds stale numbers.

    Args:
        model: The model.
        blocks: How many blocks its cache has.
        seed: Of the stale numbers, and of the order in which blocks are given out.
    """

    def __init__(self, model: FullModel, blocks: int, seed: int = 0) -> None:
        self.model = model
        generator = torch.Generator().manual_seed(seed)
        self.cache = KeyValueCache(model.spec, blocks, model.device)
        for pool in [*self.cache._keys, *self.cache._values]:
            pool.copy_(9 * torch.randn(pool.shape, generator=generator))
        self._free = torch.randperm(blocks, generator=generator).tolist()
        self._held: dict[int, list[int]] = {}
        self._positions: dict[int, int] = {}

    def step(self, rows: Sequence[tuple[int, Tensor]]) -> list[Tensor]:
        """Computes the next rows of some sequences, given as (sequence, ids), in this order: their logits."""
        spans = []
        for sequence, ids_T in rows:
            position, held = self._positions.setdefault(sequence, 0), self._held.setdefault(sequence, [])
            while len(held) < blocks_of(position + len(ids_T)):
                held.append(self._free.pop())
            spans.append(Span(tuple(held), position, len(ids_T)))
            self._positions[sequence] += len(ids_T)
        sequences = CachedSequences(spans, self.cache, self.model.rotary, self.model.device)
        x_TD = self.model.rows(torch.cat([ids_T for _, ids_T in rows]).to(self.model.device), sequences)
        logits_TV: Tensor = self.model.classifier(x_TD)
        return list(logits_TV.split([span.rows for span in spans]))

    def forget(self, sequence: int) -> None:
        """Gives a sequence's blocks back, for the next one to use as they are."""
        del self._positions[sequence]
        self._free.extend(self._held.pop(sequence))
