"""How far the mesh is from another implementation's numbers, layer by layer.

Two implementations add in different orders, so their bits differ; how much they may is told in
docs/decisions/0006-comparing-with-a-reference.md. A model in bfloat16 cannot be judged by its largest difference, since
routes flip; it is judged by the distributions that it gives where no flip can have reached.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from expertmesh import wire
from expertmesh.model.spec import ModelSpec
from expertmesh.v1.inspection_pb2 import InspectResponse
from expertmesh.verification.reference import Array, Reference, Route
from expertmesh.verification.traces import array

TOLERANCE = 2e-4
# For models in bfloat16.
MOST_DIVERGENCE = 0.03
LEAST_COSINE = 0.98
LEAST_TOP_1 = 0.9
MOST_FLIPS = 0.25
JUMP = 0.25  # of a weight; a router with a threshold (sparsemixer) flips by halving a weight, too


@dataclass(frozen=True)
class Computed:
    """What this implementation computed for the ids of a reference, in its shapes.

    Attributes:
        logits_BTV: In float32.
        hidden_LBTD: What each layer is given.
        routes: Of each layer that has experts.
        generated_BG: Greedy tokens behind the ids.
    """

    logits_BTV: Array
    hidden_LBTD: Sequence[Array]
    routes: Sequence[Route]
    generated_BG: Array

    @classmethod
    def of_traces(
        cls, spec: ModelSpec, traces: Sequence[InspectResponse], generated: Sequence[Sequence[int]]
    ) -> Computed:
        """From what inspection showed of each sequence, gone through whole, and the tokens generated behind each."""
        layers = [[trace.layers[layer] for trace in traces] for layer in range(spec.layers)]
        return cls(
            np.stack([array(trace.logits, wire.FLOAT32) for trace in traces]),
            [np.stack([array(one.input, wire.FLOAT32) for one in layer]) for layer in layers],
            [
                Route(
                    np.concatenate([array(one.expert_ids, wire.INT32) for one in layers[layer]]),
                    np.concatenate([array(one.weights, wire.FLOAT32) for one in layers[layer]]),
                )
                for layer in spec.sparse_layers
            ],
            np.array(generated),
        )


@dataclass
class LayerAgreement:
    """One layer.

    Attributes:
        layer: Which.
        hidden: Largest absolute difference of what the layer is given.
        tokens: Tokens that were routed; 0 in a layer without experts.
        equal_routes: How many of these went to the very same experts; in bfloat16 also with no weight that jumped.
        weight: Largest absolute difference of a weight, where routes are equal.
    """

    layer: int
    hidden: float = 0.0
    tokens: int = 0
    equal_routes: int = 0
    weight: float = 0.0


@dataclass
class Likeness:
    """How alike two distributions over the next token are, where no flipped route can have reached.

    Attributes:
        tokens: Tokens that this is taken from.
        divergence: Mean Kullback-Leibler divergence from the reference, in nats.
        cosine: Smallest cosine of the angle between logits.
        top_1: Share of tokens whose likeliest successor is the same.
    """

    tokens: int = 0
    divergence: float = 0.0
    cosine: float = 1.0
    top_1: float = 1.0


@dataclass
class Agreement:
    """All of it.

    Attributes:
        spec: The model.
        layers: By layer.
        logits: Largest absolute difference of a logit.
        scale: Standard deviation of the reference's logits.
        likeness: Of the logits.
        tokens: Greedy tokens that were compared.
        equal_tokens: How many are equal.
    """

    spec: ModelSpec
    layers: list[LayerAgreement]
    logits: float = 0.0
    scale: float = 0.0
    likeness: Likeness = field(default_factory=Likeness)
    tokens: int = 0
    equal_tokens: int = 0

    @property
    def hidden(self) -> float:
        """Largest absolute difference of what any layer is given."""
        return max(layer.hidden for layer in self.layers)

    @property
    def weight(self) -> float:
        """Largest absolute difference of a weight."""
        return max(layer.weight for layer in self.layers)

    @property
    def routes(self) -> tuple[int, int]:
        """Equal routes, and all."""
        return sum(layer.equal_routes for layer in self.layers), sum(layer.tokens for layer in self.layers)

    def faults(self, tolerance: float) -> list[str]:
        """What does not agree; nothing if all does."""
        equal, routes = self.routes
        if self.spec.dtype == "bfloat16":
            like = self.likeness
            found = {
                f"{routes - equal} of {routes} routes flipped": routes - equal > MOST_FLIPS * routes,
                "every token was reached by a flipped route": not like.tokens,
                f"mean divergence {like.divergence:.2g} nats": not like.divergence <= MOST_DIVERGENCE,
                f"cosine {like.cosine:.3g}": not like.cosine >= LEAST_COSINE,
                f"top-1 agreement {like.top_1:.0%}": not like.top_1 >= LEAST_TOP_1,
            }
        else:
            found = {
                f"logits differ by {self.logits:.2g}": not self.logits <= tolerance,
                f"hidden states differ by {self.hidden:.2g}": not self.hidden <= tolerance,
                f"router weights differ by {self.weight:.2g}": not self.weight <= tolerance,
                f"{routes - equal} of {routes} routes differ": equal != routes,
                f"{self.tokens - self.equal_tokens} of {self.tokens} greedy tokens differ": self.equal_tokens
                != self.tokens,
            }
        return [fault for fault, holds in found.items() if holds]


def agreement(spec: ModelSpec, reference: Reference, computed: Computed) -> Agreement:
    """Compares what was computed with a reference."""
    untouched_BT = np.ones(reference.ids_BT.shape, bool)
    layers = [LayerAgreement(layer) for layer in range(spec.layers)]
    for one in layers:
        one.hidden = _largest(computed.hidden_LBTD[one.layer], reference.hidden_LBTD[one.layer])
        if one.layer not in spec.sparse_layers:
            continue
        number = spec.sparse_layers.index(one.layer)
        ours, theirs = computed.routes[number], reference.routes[number]
        same_T = (ours.experts_TK == theirs.experts_TK).all(axis=1)
        if spec.dtype == "bfloat16":
            same_T &= (np.abs(ours.weights_TK - theirs.weights_TK) <= JUMP).all(axis=1)
        one.tokens, one.equal_routes = len(same_T), int(same_T.sum())
        one.weight = _largest(ours.weights_TK[same_T], theirs.weights_TK[same_T])
        same_BT = same_T.reshape(untouched_BT.shape)
        # What a flip does to its token is seen by all later ones, unless no attention follows.
        untouched_BT &= same_BT if one.layer == spec.layers - 1 else np.logical_and.accumulate(same_BT, axis=1)
    ours_BG, theirs_BG = computed.generated_BG, reference.generated_BG
    return Agreement(
        spec,
        layers,
        _largest(computed.logits_BTV, reference.logits_BTV),
        float(reference.logits_BTV.std()),
        _likeness(computed.logits_BTV[untouched_BT], reference.logits_BTV[untouched_BT]),
        theirs_BG.size,
        int((ours_BG == theirs_BG).sum()) if ours_BG.shape == theirs_BG.shape else 0,
    )


def _largest(left: Array, right: Array) -> float:
    return float(np.abs(left - right).max(initial=0.0))


def _likeness(ours_NV: Array, theirs_NV: Array) -> Likeness:
    if not len(ours_NV):
        return Likeness()
    ours, theirs = ours_NV.astype(np.float64), theirs_NV.astype(np.float64)
    log_ours, log_theirs = _log_softmax(ours), _log_softmax(theirs)
    divergence_N = (np.exp(log_theirs) * (log_theirs - log_ours)).sum(axis=1)
    lengths_N = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosine_N = (ours * theirs).sum(axis=1) / np.maximum(lengths_N, np.finfo(np.float64).tiny)
    top_1 = (ours.argmax(axis=1) == theirs.argmax(axis=1)).mean()
    return Likeness(len(ours), float(divergence_N.mean()), float(cosine_N.min()), float(top_1))


def _log_softmax(x_NV: Array) -> Array:
    shifted: Array = x_NV - x_NV.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
