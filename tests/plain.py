"""A language model as the papers write it, in float64 numpy: row by row and head by head, with nothing cached,
absorbed, padded or sorted. It shares no code with the product; what a spec means is said a second time here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from expertmesh.model.full import FullModel
from expertmesh.model.spec import AttentionSpec, ExpertSpec, ModelSpec, RotarySpec, RouterSpec

Array = npt.NDArray[np.float64]


class Weights:
    """The tensors of one part.

    Args:
        tensors: By name.
        prefix: Of the part.
    """

    def __init__(self, tensors: Mapping[str, Array], prefix: str = "") -> None:
        self.tensors, self.prefix = tensors, prefix

    def of(self, name: Any) -> Weights:
        """A part of it."""
        return Weights(self.tensors, f"{self.prefix}{name}.")

    def get(self, name: str) -> Array | None:
        """A tensor, if there is one."""
        return self.tensors.get(self.prefix + name)

    def __getitem__(self, name: str) -> Array:
        return self.tensors[self.prefix + name]

    def apply(self, x: Array) -> Array:
        """This part as a linear layer."""
        y = x @ self["weight"].T
        bias = self.get("bias")
        return y if bias is None else y + bias


def weights_of(model: FullModel) -> Weights:
    """A model's tensors."""
    return Weights({name: value.double().numpy() for name, value in model.state_dict().items()})


def logits(spec: ModelSpec, weights: Weights, ids: Any) -> Array:
    """Next-token logits [T, V] of one sequence."""
    embedding = weights.of("embedding")
    x = embedding["token.weight"][ids] * spec.embedding.multiplier
    if spec.embedding.learned_positions:
        x = x + embedding["position.weight"][: len(ids)]
    for layer in range(spec.layers):
        gating = weights.of(f"gating.{layer}")
        x = x + spec.residual_multiplier * attention(spec, gating, layer, norm(spec, gating.of("attention_norm"), x))
        rows = norm(spec, gating.of("expert_norm"), x)
        more = np.stack([mixture(spec, weights, layer, row) for row in rows])
        x = x + spec.residual_multiplier * more
    classifier = weights.of("classifier")
    return classifier.of("out").apply(norm(spec, classifier.of("norm"), x)) / spec.head.divisor


def norm(spec: ModelSpec, weights: Weights, x: Array) -> Array:
    """The norm of a block."""
    if spec.norm.kind == "rms":
        return rms(x, weights["weight"], spec.norm.eps)
    mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + spec.norm.eps) * weights["weight"] + weights["bias"]


def rms(x: Array, weight: Array, eps: float) -> Array:
    """Root mean square norm."""
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * weight


def attention(spec: ModelSpec, weights: Weights, layer: int, x: Array) -> Array:
    """What attention adds, before the residual multiplier."""
    project = _latent if spec.attention.kind == "latent" else _grouped
    queries, keys, values = project(spec, weights, x)  # each [T, heads, width]
    sinks, mixed = weights.get("sinks"), []
    for head in range(spec.attention.heads):
        sink = None if sinks is None else sinks[head]
        width = queries.shape[2]
        scale = spec.attention.scale or width**-0.5
        mixed.append(
            attend(queries[:, head], keys[:, head], values[:, head], scale, spec.attention.window(layer), sink)
        )
    return weights.of("out").apply(np.concatenate(mixed, axis=1))


def attend(q: Array, k: Array, v: Array, scale: float, window: int, sink: float | None) -> Array:
    """Causal attention of one head."""
    rows = []
    for place in range(len(q)):
        first = max(0, place - window + 1) if window else 0
        scores = scale * (k[first : place + 1] @ q[place])
        powers = np.exp(scores - scores.max())
        total = powers.sum() + (0.0 if sink is None else np.exp(sink - scores.max()))
        rows.append(powers @ v[first : place + 1] / total)
    return np.stack(rows)


def _grouped(spec: ModelSpec, weights: Weights, x: Array) -> tuple[Array, Array, Array]:
    attention = spec.attention
    q, k, v = (weights.of(name).apply(x) for name in "qkv")

    def normed(rows: Array, name: str) -> Array:
        return rms(rows, weights[f"{name}_norm.weight"], spec.norm.eps)

    if attention.qk_norm == "flat":
        q, k = normed(q, "q"), normed(k, "k")
    if attention.clip:
        q, k, v = (np.clip(part, -attention.clip, attention.clip) for part in (q, k, v))
    q, k, v = (part.reshape(len(x), -1, attention.head_width) for part in (q, k, v))
    if attention.qk_norm == "head":
        q, k = normed(q, "q"), normed(k, "k")
    q, k = rotated(spec.rotary, q), rotated(spec.rotary, k)
    share = attention.heads // attention.kv_heads
    owners = [head // share for head in range(attention.heads)]
    return q, k[:, owners], v[:, owners]


def _latent(spec: ModelSpec, weights: Weights, x: Array) -> tuple[Array, Array, Array]:
    """Keys and values of every head, written out."""
    attention: AttentionSpec = spec.attention
    turned, eps = 2 * len(spec.rotary.frequencies), attention.latent_eps
    if attention.query_rank:
        q = weights.of("q_up").apply(rms(weights.of("q_down").apply(x), weights["q_down_norm.weight"], eps))
    else:
        q = weights.of("q").apply(x)
    q = q.reshape(len(x), attention.heads, attention.head_width + turned)
    down = weights.of("kv_down").apply(x)
    latent = rms(down[:, : attention.latent_rank], weights["latent_norm.weight"], eps)
    up = weights.of("kv_up").apply(latent).reshape(len(x), attention.heads, -1)
    k_turned = rotated(spec.rotary, down[:, None, attention.latent_rank :])
    k = np.concatenate([up[..., : attention.head_width], np.repeat(k_turned, attention.heads, axis=1)], axis=2)
    q_turned = rotated(spec.rotary, q[..., attention.head_width :])
    return np.concatenate([q[..., : attention.head_width], q_turned], axis=2), k, up[..., attention.head_width :]


def rotated(rotary: RotarySpec, x: Array) -> Array:
    """Rows [T, heads, width] that stand at positions 0 to T - 1: each pair is a complex number that is turned."""
    result, half = x.copy(), len(rotary.frequencies)
    for pair, frequency in enumerate(rotary.frequencies):
        left, right = (2 * pair, 2 * pair + 1) if rotary.interleaved else (pair, pair + half)
        angles = np.arange(len(x)) * float(np.float32(frequency))
        turned = (x[..., left] + 1j * x[..., right]) * rotary.magnitude * np.exp(1j * angles)[:, None]
        result[..., left], result[..., right] = turned.real, turned.imag
    return result


def mixture(spec: ModelSpec, weights: Weights, layer: int, row: Array) -> Array:
    """What one row gets from its experts, the shared one, or the dense layer."""
    gating = weights.of(f"gating.{layer}")
    if layer in spec.dense.layers:
        return mlp(spec.expert, gating.of("dense"), row)
    chosen = routes(spec.router, gating.of("router").apply(row), gating.get("selection_bias"))
    experts = weights.of(f"experts.{layer}")
    total = sum(weight * mlp(spec.expert, experts.of(expert), row) for expert, weight in chosen.items())
    if spec.dense.shared_width:
        shared = mlp(spec.expert, gating.of("shared"), row)
        if spec.dense.shared_gate:
            shared = shared * logistic(gating.of("shared_gate").apply(row))
        total = total + shared
    return total


def mlp(spec: ExpertSpec, weights: Weights, row: Array) -> Array:
    """A gated MLP."""
    gate, up = weights.of("gate").apply(row), weights.of("up").apply(row)
    if spec.activation == "swiglu_clamped":
        gate, up = np.minimum(gate, spec.limit), np.clip(up, -spec.limit, spec.limit)
        return weights.of("down").apply((up + 1) * gate * logistic(spec.alpha * gate))
    return weights.of("down").apply(gate * logistic(gate) * up)


def logistic(x: Array) -> Array:
    """The logistic function."""
    return 1 / (1 + np.exp(-x))


def softmax(values: list[float]) -> list[float]:
    """Softmax of numbers."""
    powers = [np.exp(value - max(values)) for value in values]
    return [power / sum(powers) for power in powers]


def routes(spec: RouterSpec, scores: Array, selection_bias: Array | None = None) -> dict[int, float]:
    """The experts of one row and their weights."""
    experts = range(spec.experts)
    if spec.score == "sparsemixer":
        return {expert: spec.scale * weight for expert, weight in _sparsemixer(spec, scores.tolist()).items()}
    if spec.score == "softmax":
        values = softmax(scores.tolist())
    elif spec.score == "sigmoid":
        values = logistic(scores).tolist()
    else:
        values = scores.tolist()
    rank = values if selection_bias is None else [a + b for a, b in zip(values, selection_bias.tolist(), strict=True)]
    size = spec.experts // spec.groups
    groups = [[rank[expert] for expert in experts if expert // size == group] for group in range(spec.groups)]
    best = 2 if spec.group_score == "top2" else 1
    worth = [sum(sorted(group, reverse=True)[:best]) for group in groups]
    kept = sorted(range(spec.groups), key=lambda group: -worth[group])[: spec.kept_groups]
    candidates = [expert for expert in experts if expert // size in kept]
    chosen = sorted(candidates, key=lambda expert: -rank[expert])[: spec.top_k]
    if spec.score == "softmax_top":
        weights = softmax([values[expert] for expert in chosen])
    else:
        weights = [values[expert] for expert in chosen]
        if spec.renormalise:
            weights = [weight / sum(weights) for weight in weights]
    return {expert: spec.scale * weight for expert, weight in zip(chosen, weights, strict=True)}


def _sparsemixer(spec: RouterSpec, scores: list[float]) -> dict[int, float]:
    """GRIN: an expert counts beside the best if it is nearer than twice the jitter, relative to the larger of both."""
    chosen: dict[int, float] = {}
    for _ in range(2):
        left = [expert for expert in range(spec.experts) if expert not in chosen]
        best = max(left, key=lambda expert: scores[expert])
        near = [
            expert
            for expert in left
            if (scores[best] - scores[expert]) / max(abs(scores[expert]), scores[best]) <= 2 * spec.jitter
        ]
        chosen[best] = softmax([scores[expert] for expert in near])[near.index(best)]
    return chosen
