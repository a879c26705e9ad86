"""One pass: texts in, classifications out, whatever answers the stage calls in between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np

from expertmesh.dispatch import ApplyExperts, Gate, Scores, StageCall
from expertmesh.errors import InvalidInput, MeshError, NotFinite
from expertmesh.model.spec import ModelSpec
from expertmesh.tokenization.tokenizer import Encoded
from expertmesh.v1.inference_pb2 import ROUTE_DEGRADED, Classification, ExpertId, Route, StageTiming
from expertmesh.wire import encode

PROFILE_SEPARATOR = " + "
EXACT_PROFILES = (
    "cpu-fp32 ",
    "cpu-bf16 ",
    *(f"cuda-{dtype} NVIDIA {card}" for dtype in ("fp32", "bf16") for card in ("H100", "H200")),  # docs/gpu.md
)


class Timing:
    """Adds the time that passes inside to one of some sums; no generator, since every stage call enters one.

    Args:
        seconds: The sums.
        name: Of one.
    """

    __slots__ = ("_name", "_seconds", "_started_s")

    def __init__(self, seconds: defaultdict[str, float], name: str) -> None:
        self._seconds, self._name = seconds, name

    def __enter__(self) -> None:
        self._started_s = perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._name] += perf_counter() - self._started_s


@dataclass
class Stopwatch:
    """Seconds spent per stage."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def time(self, stage: str) -> Timing:
        """Adds what happens inside to a stage."""
        return Timing(self.seconds, stage)

    def timings(self) -> list[StageTiming]:
        """The stages in the order they were first entered."""
        return [StageTiming(stage=stage, seconds=seconds) for stage, seconds in self.seconds.items()]


@dataclass(frozen=True)
class Answer:
    """One text's classification and where its pass spent its time."""

    classification: Classification
    timings: Sequence[StageTiming]


class ExpertTokens:
    """Counts how many tokens of each sequence every expert served.

    Args:
        spec: The model.
        lengths_B: Tokens of each sequence.

    Attributes:
        counts_BLE: The counts.
        missing_B: For each sequence (layer, expert) of what its tokens wanted and was missing.
    """

    def __init__(self, spec: ModelSpec, lengths_B: Any) -> None:
        self._experts = spec.router.experts
        self._sequence_T = np.repeat(np.arange(len(lengths_B)), lengths_B)
        self.counts_BLE = np.zeros((len(lengths_B), spec.layers, spec.router.experts), np.int32)
        self.missing_B: list[list[tuple[int, int]]] = [[] for _ in lengths_B]

    def observe(self, call: StageCall, result: Any) -> None:
        """Counts the routes that a gating call gave, less those that went to experts that were missing."""
        if isinstance(call, ApplyExperts):
            for expert in result.missing:
                for sequence in np.flatnonzero(self.counts_BLE[:, call.layer, expert]):
                    self.missing_B[sequence].append((call.layer, expert))
                self.counts_BLE[:, call.layer, expert] = 0
        elif isinstance(call, Gate) and result.expert_ids_TK is not None:
            places_TK = self._sequence_T[:, None] * self._experts + np.asarray(result.expert_ids_TK)
            counts = np.bincount(places_TK.reshape(-1), minlength=self.counts_BLE[:, 0].size)
            self.counts_BLE[:, call.layer] = counts.reshape(-1, self._experts)


@dataclass(frozen=True)
class Provenance:
    """How an answer came to be.

    Attributes:
        route: The way it came.
        exact: Whether it is bit-equal to what the full model gives.
        profile: What it was computed on.
        missing: (layer, expert) of what was wanted and missing, ascending.
    """

    route: Route
    exact: bool
    profile: str
    missing: tuple[tuple[int, int], ...] = ()

    def without(self, missing: Iterable[tuple[int, int]]) -> Provenance:
        """The same where some experts were missing, if any were."""
        experts = tuple(sorted(missing))
        return Provenance(ROUTE_DEGRADED, False, self.profile, experts) if experts else self

    def missing_experts(self) -> list[ExpertId]:
        """What was missing, as messages."""
        return [ExpertId(layer=layer, expert=expert) for layer, expert in self.missing]


def are_exact(profiles: Set[str]) -> bool:
    """Whether answers computed on these profiles are bit-equal to the full model's.

    They are if all are one, and that is of a kind that the operations of `model.invariant` are tested on.
    """
    return len(profiles) == 1 and next(iter(profiles)).startswith(EXACT_PROFILES)


def kept(encoded: Encoded) -> Any:
    """The lengths of the texts that have tokens; the others get an error of their own."""
    return encoded.lengths_B[encoded.lengths_B > 0]


def to_answers(
    spec: ModelSpec,
    encoded: Encoded,
    scores: Scores | None,
    expert_tokens: ExpertTokens,
    provenance: Provenance,
    stopwatch: Stopwatch,
) -> list[Answer | MeshError]:
    """Writes the results of a pass, one for every text.

    Args:
        spec: The model.
        encoded: The texts' tokens.
        scores: Scores of the texts that have tokens, as numpy arrays; None if none has.
        expert_tokens: Counts of those texts.
        provenance: How they were computed.
        stopwatch: Where the time went.
    """
    answers: list[Answer | MeshError] = []
    timings = stopwatch.timings()
    row = 0
    for index, length in enumerate(encoded.lengths_B.tolist()):
        if length == 0 or scores is None:
            answers.append(InvalidInput("nothing is left of the text after normalisation", "texts"))
            continue
        probabilities_C = scores.probabilities_BC[row]
        if not (np.isfinite(probabilities_C).all() and np.isfinite(scores.logits_BC[row]).all()):
            answers.append(NotFinite("the scores are not finite"))
            row += 1
            continue
        told = provenance.without(expert_tokens.missing_B[row])
        classification = Classification(
            label=spec.head.labels[int(probabilities_C.argmax())],
            probabilities=probabilities_C.tolist(),
            logits=scores.logits_BC[row].tolist(),
            tokens=length,
            truncated=bool(encoded.truncated_B[index]),
            route=told.route,
            exact=told.exact,
            profile=told.profile,
            expert_tokens=encode(expert_tokens.counts_BLE[row]),
            missing_experts=told.missing_experts(),
        )
        answers.append(Answer(classification, timings))
        row += 1
    return answers
