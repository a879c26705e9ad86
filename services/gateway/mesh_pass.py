"""One pass of texts through the mesh: answers the layer loop's stage calls by RPC."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt

from expertmesh import wire
from expertmesh.dispatch import ApplyExperts, Embed, Gate, Gated, Score, Scores, StageCall, classify, drive_async
from expertmesh.errors import CorruptReply, MeshError, Unavailable
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas import ReplicaSet
from expertmesh.serving.inspection import Observer
from expertmesh.serving.passes import Answer, ExpertTokens, Provenance, Stopwatch, are_exact, kept, to_answers
from expertmesh.tokenization.tokenizer import Encoded
from expertmesh.v1.classifier_pb2 import ScoreRequest, ScoreResponse
from expertmesh.v1.embedding_pb2 import EmbedRequest, EmbedResponse
from expertmesh.v1.expert_pb2 import ApplyRequest, ApplyResponse
from expertmesh.v1.gating_pb2 import GateRequest, GateResponse
from expertmesh.v1.inference_pb2 import ROUTE_MESH
from expertmesh.v1.tokenizer_pb2 import EncodeRequest, EncodeResponse

from .mesh import Mesh, expert_unavailable

Rows = npt.NDArray[np.float32]


class MeshPass:
    """The state of one pass: who answered, and where the time went.

    Args:
        mesh: The services.
        deadline: Of the whole pass.
        observe: Is shown every stage call and its result.
    """

    def __init__(self, mesh: Mesh, deadline: Deadline, observe: Observer | None = None) -> None:
        self._mesh = mesh
        self._spec = mesh.manifest.spec
        self._deadline = deadline
        self._observe = observe
        self._stopwatch = Stopwatch()
        self._profiles: set[str] = set()

    async def run(self, texts: Sequence[str]) -> Sequence[Answer | MeshError]:
        """Answers texts, each by a classification or by the error of that one text.

        Raises:
            Unavailable: A stage or an expert has no live replica left; names it.
            MeshError: The pass failed as a whole.
        """
        self._mesh.require_complete()
        with self._stopwatch.time("tokenizer"):
            encoded = await self._encode(texts)
        lengths_B = kept(encoded)
        expert_tokens = ExpertTokens(self._spec, lengths_B)
        scores = await self._scores(encoded.ids_T, lengths_B, expert_tokens) if len(lengths_B) else None
        return to_answers(self._spec, encoded, scores, expert_tokens, self._provenance(), self._stopwatch)

    def _provenance(self) -> Provenance:
        """Exact if all who took part compute alike, and as the full model does, whose answers are what exact means."""
        profiles = set(self._profiles)
        if self._mesh.full_model is not None:
            profiles |= {replica.description.profile for replica in self._mesh.full_model.live}
        return Provenance(ROUTE_MESH, are_exact(profiles), " + ".join(sorted(self._profiles)))

    async def _scores(self, ids_T: Any, lengths_B: Any, expert_tokens: ExpertTokens) -> Scores:
        given_s = perf_counter()

        async def answer(call: StageCall) -> Any:
            nonlocal given_s
            self._stopwatch.seconds["combine"] += perf_counter() - given_s
            result = await self._answer(call)
            given_s = perf_counter()
            expert_tokens.observe(call, result)
            if self._observe is not None:
                self._observe(call, result)
            return result

        return await drive_async(classify(self._spec, ids_T, lengths_B), answer)

    async def _answer(self, call: StageCall) -> Any:
        match call:
            case Embed():
                with self._stopwatch.time("embedding"):
                    return await self._embed(call)
            case Gate():
                with self._stopwatch.time("gating"):
                    return await self._gate(call)
            case ApplyExperts():
                with self._stopwatch.time("expert"):
                    return await self._apply(call)
            case Score():
                with self._stopwatch.time("classifier"):
                    return await self._score(call)

    async def _encode(self, texts: Sequence[str]) -> Encoded:
        def read(reply: EncodeResponse, origin: Origin) -> Encoded:
            lengths_B = wire.decode(reply.lengths, wire.INT32, (len(texts),), "lengths")
            total = int(lengths_B.sum(dtype=np.int64))
            if lengths_B.min() < 0 or lengths_B.max() > self._spec.context or len(reply.truncated) != len(texts):
                raise CorruptReply("lengths or truncated cannot be right")
            ids_T = wire.decode(reply.ids, wire.INT32, (total,), "ids") if total else np.empty(0, np.int32)
            if total and not 0 <= ids_T.min() <= ids_T.max() < self._spec.embedding.vocab:
                raise CorruptReply("ids cannot be right")
            return Encoded(ids_T, lengths_B, np.array(reply.truncated, dtype=np.bool_))

        return await self._mesh.tokenizer.call("Encode", EncodeRequest(texts=texts), self._deadline, read)

    async def _embed(self, call: Embed) -> Rows:
        def read(reply: EmbedResponse, origin: Origin) -> Rows:
            self._note(origin)
            return wire.decode_finite(reply.rows, (len(call.ids_T), self._spec.width), "rows")

        request = EmbedRequest(ids=wire.encode(call.ids_T), lengths=wire.encode(call.lengths_B))
        return await self._mesh.embedding.call("Embed", request, self._deadline, read)

    async def _gate(self, call: Gate) -> Gated:
        tokens, width = call.x_TD.shape
        top_k, experts = self._spec.router.top_k, self._spec.router.experts

        def read(reply: GateResponse, origin: Origin) -> Gated:
            self._note(origin)
            ids_TK = wire.decode(reply.expert_ids, wire.INT32, (tokens, top_k), "expert_ids")
            if ids_TK.min() < 0 or ids_TK.max() >= experts or (np.diff(ids_TK, axis=1) <= 0).any():
                raise CorruptReply("expert_ids must ascend and name experts of the model")
            return Gated(
                wire.decode_finite(reply.residual, (tokens, width), "residual"),
                wire.decode_finite(reply.expert_input, (tokens, width), "expert_input"),
                ids_TK,
                wire.decode_finite(reply.weights, (tokens, top_k), "weights"),
            )

        request = GateRequest(layer=call.layer, rows=wire.encode(call.x_TD), lengths=wire.encode(call.lengths_B))
        return await self._mesh.gating.call("Gate", request, self._deadline, read)

    async def _score(self, call: Score) -> Scores:
        shape = (len(call.lengths_B), len(self._spec.head.labels))

        def read(reply: ScoreResponse, origin: Origin) -> Scores:
            self._note(origin)
            logits_BC = wire.decode_finite(reply.logits, shape, "logits")
            return Scores(logits_BC, wire.decode_finite(reply.probabilities, shape, "probabilities"))

        request = ScoreRequest(rows=wire.encode(call.x_TD), lengths=wire.encode(call.lengths_B))
        return await self._mesh.classifier.call("Score", request, self._deadline, read)

    async def _apply(self, call: ApplyExperts) -> Rows:
        out_ND: Rows = np.empty_like(call.rows_ND)
        await self._apply_all(call, call.slices(), out_ND)
        return out_ND

    async def _apply_all(self, call: ApplyExperts, work: list[tuple[int, slice]], out_ND: Rows) -> None:
        """One message to each expert service that has rows, all at once."""
        service2work: dict[ReplicaSet, list[tuple[int, slice]]] = {}
        for expert, rows in work:
            service2work.setdefault(self._mesh.holder(call.layer, expert), []).append((expert, rows))
        tasks = [
            asyncio.create_task(self._apply_at(service, call, work, out_ND)) for service, work in service2work.items()
        ]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _apply_at(
        self, service: ReplicaSet, call: ApplyExperts, work: list[tuple[int, slice]], out_ND: Rows
    ) -> None:
        experts = [expert for expert, _ in work]
        rows_ND = np.concatenate([call.rows_ND[rows] for _, rows in work])
        digests = [self._mesh.expert_digest(call.layer, expert) for expert in experts]

        def read(reply: ApplyResponse, origin: Origin) -> Rows:
            if reply.layer != call.layer or list(reply.experts) != experts or list(reply.digests) != digests:
                raise CorruptReply("it is of another layer, expert or weight than was asked for")
            self._note(origin)
            out: Rows = wire.decode_finite(reply.rows, rows_ND.shape, "rows")
            return out

        request = ApplyRequest(
            layer=call.layer,
            experts=experts,
            counts=[rows.stop - rows.start for _, rows in work],
            rows=wire.encode(rows_ND),
        )
        try:
            given_ND = await service.call("Apply", request, self._deadline, read)
        except Unavailable as error:
            if service.live:
                raise expert_unavailable(error, call.layer, experts[0]) from None
            await self._apply_all(call, work, out_ND)  # by other services that hold these experts, if there are any
            return
        start = 0
        for _, rows in work:
            stop = start + rows.stop - rows.start
            out_ND[rows] = given_ND[start:stop]
            start = stop

    def _note(self, origin: Origin) -> None:
        self._profiles.add(origin.profile)
