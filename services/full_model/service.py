"""What the full model offers: the same `InferenceService` as the gateway, with every stage called directly."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter

import torch

from expertmesh.checkpoint.tokenizer import load_classifier_tokenizer
from expertmesh.dispatch import Scores
from expertmesh.errors import InvalidInput, MeshError
from expertmesh.model.arrays import to_numpy
from expertmesh.rpc.deadline import Deadline
from expertmesh.serving.batcher import Batcher, Limits
from expertmesh.serving.inspection import Observer, Trace
from expertmesh.serving.passes import Answer, ExpertTokens, Provenance, Stopwatch, are_exact, kept, to_answers
from expertmesh.serving.stage import Stage
from expertmesh.telemetry import metrics
from expertmesh.tokenization.tokenizer import Encoded
from expertmesh.v1.inference_pb2 import (
    CONTRACT_MESH_ONLY,
    ROUTE_FULL_MODEL,
    ROUTE_MESH,
    Contract,
    Route,
)
from expertmesh.v1.inspection_pb2 import InspectRequest, InspectResponse


class LocalClassifier:
    """Answers texts in this process, in one thread of its own so that health and metrics answer meanwhile.

    Args:
        stage: Device and loader.
        limits: How much is taken on.
    """

    def __init__(self, stage: Stage, limits: Limits) -> None:
        self._stage = stage
        self._work = metrics.Work("full_model")
        self._model = stage.loader.full_model()
        self._tokenizer = load_classifier_tokenizer(stage.loader.folder, stage.loader.manifest)
        threads = torch.get_num_threads()
        self._thread = ThreadPoolExecutor(1, "model", initializer=torch.set_num_threads, initargs=(threads,))
        self._batcher: Batcher[str, Answer] = Batcher(self._run_pass, limits, len)
        self._compute(["warm-up"], lambda call, result: None)

    async def classify(
        self, texts: Sequence[str], contract: Contract, route: Route, deadline: Deadline
    ) -> list[Answer]:
        """Answers texts, in their order.

        Raises:
            InvalidInput: The caller wants the mesh, which this is not.
        """
        if route == ROUTE_MESH or contract == CONTRACT_MESH_ONLY:
            raise InvalidInput("this is the full model; ask the gateway for the mesh", "route")
        return await self._batcher.submit(texts, deadline)

    async def inspect(self, request: InspectRequest, deadline: Deadline) -> InspectResponse:
        """Gives the trace of one text."""
        trace = Trace()
        for answer in await self._in_thread([request.text], trace.observe):
            if isinstance(answer, MeshError):
                raise answer
        return trace.response

    async def _run_pass(self, texts: list[str], deadline: Deadline) -> Sequence[Answer | MeshError]:
        return await self._in_thread(texts, None)

    async def _in_thread(self, texts: list[str], observe: Observer | None) -> Sequence[Answer | MeshError]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._compute, texts, observe)

    def _compute(self, texts: list[str], observe: Observer | None) -> Sequence[Answer | MeshError]:
        stopwatch = Stopwatch()
        started_s = perf_counter()
        with stopwatch.time("full_model"):
            encoded = self._tokenizer.encode(texts, self._stage.spec.context)
            scores, expert_tokens = self._scores(encoded, observe)
        self._work.done(len(encoded.ids_T), perf_counter() - started_s)
        profile = self._stage.profile.name
        provenance = Provenance(ROUTE_FULL_MODEL, are_exact({profile}), profile)
        return to_answers(self._stage.spec, encoded, scores, expert_tokens, provenance, stopwatch)

    def _scores(self, encoded: Encoded, observe: Observer | None) -> tuple[Scores | None, ExpertTokens]:
        lengths_B = kept(encoded)
        expert_tokens = ExpertTokens(self._stage.spec, lengths_B)

        def watch(call: object, result: object) -> None:
            expert_tokens.observe(call, result)  # type: ignore[arg-type]
            if observe is not None:
                observe(call, result)  # type: ignore[arg-type]

        if not len(lengths_B):
            return None, expert_tokens
        with torch.inference_mode():
            scores = self._model(self._stage.tensor(encoded.ids_T).long(), self._stage.tensor(lengths_B), watch)
        return Scores(to_numpy(scores.logits_BC), to_numpy(scores.probabilities_BC)), expert_tokens
