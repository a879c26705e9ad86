"""Stage calls of the layer loop, answered by RPC: one call to a stage, or one to each expert service that has rows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from expertmesh import wire
from expertmesh.dispatch import ApplyExperts, Embed, Gate, Gated, Score, Scores, StageCall
from expertmesh.errors import CorruptReply, Unavailable
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replica import Replica
from expertmesh.rpc.replicas import ReplicaSet
from expertmesh.serving.passes import Stopwatch, are_exact
from expertmesh.v1.classifier_pb2 import Draw, SampleRequest, SampleResponse, ScoreRequest, ScoreResponse
from expertmesh.v1.embedding_pb2 import EmbedRequest, EmbedResponse
from expertmesh.v1.expert_pb2 import ApplyRequest, ApplyResponse
from expertmesh.v1.gating_pb2 import GateRequest, GateResponse, Place
from expertmesh.v1.sampling_pb2 import TokenLogprobs

from .mesh import Mesh, expert_unavailable

Rows = npt.NDArray[Any]


class StageCalls:
    """Answers stage calls, and remembers who computed.

    Args:
        mesh: The services.
        deadline: Of all these calls together.
        places: Where the rows of each sequence belong in the KV cache, for a model that has one.
        home: The gating replica that has them.

    Attributes:
        stopwatch: Where the time went.
        profiles: The numeric profiles of everybody who computed.
    """

    def __init__(
        self, mesh: Mesh, deadline: Deadline, places: Sequence[Place] = (), home: Replica | None = None
    ) -> None:
        self._mesh = mesh
        self._spec = mesh.manifest.spec
        self._deadline = deadline
        self._places = places
        self._home = home
        self.stopwatch = Stopwatch()
        self.profiles: set[str] = set()

    @property
    def is_exact(self) -> bool:
        """Whether all who took part compute alike, and as the full model does, whose answers are what exact means."""
        return not self._mesh.narrows and are_exact(self.profiles | self._mesh.reference_profiles)

    async def answer(self, call: StageCall) -> Any:
        """Answers one call.

        Raises:
            Unavailable: No replica of the stage or expert is left; names it.
            MeshError: It failed for another reason.
        """
        match call:
            case Embed():
                with self.stopwatch.time("embedding"):
                    return await self._embed(call)
            case Gate():
                with self.stopwatch.time("gating"):
                    return await self._gate(call)
            case ApplyExperts():
                with self.stopwatch.time("expert"):
                    return await self._apply(call)
            case Score():
                with self.stopwatch.time("classifier"):
                    return await self._score(call)

    async def sample(self, rows_BD: Rows, draws: Sequence[Draw]) -> list[TokenLogprobs]:
        """The next token of each row."""

        def read(reply: SampleResponse, origin: Origin) -> list[TokenLogprobs]:
            self._note(origin)
            if len(reply.tokens) != len(draws):
                raise CorruptReply("it has not one token for each row")
            if not all(0 <= token.id < self._spec.embedding.vocab for token in reply.tokens):
                raise CorruptReply("a token is not in the vocabulary")
            return list(reply.tokens)

        request = SampleRequest(rows=wire.encode(rows_BD), draws=draws)
        with self.stopwatch.time("classifier"):
            return await self._mesh.classifier.call("Sample", request, self._deadline, read)

    async def _embed(self, call: Embed) -> Rows:
        def read(reply: EmbedResponse, origin: Origin) -> Rows:
            self._note(origin)
            return wire.decode_finite(reply.rows, (len(call.ids_T), self._spec.width), "rows")

        request = EmbedRequest(ids=wire.encode(call.ids_T), lengths=wire.encode(call.lengths_B))
        return await self._mesh.embedding.call("Embed", request, self._deadline, read)

    async def _gate(self, call: Gate) -> Gated:
        tokens, width = call.x_TD.shape
        top_k, experts = self._spec.router.top_k, self._spec.router.experts
        is_sparse = call.layer not in self._spec.dense.layers

        def read(reply: GateResponse, origin: Origin) -> Gated:
            self._note(origin)
            residual_TD = wire.decode_finite(reply.residual, (tokens, width), "residual")
            if not is_sparse:
                return Gated(residual_TD)
            ids_TK = wire.decode(reply.expert_ids, wire.INT32, (tokens, top_k), "expert_ids")
            if ids_TK.min() < 0 or ids_TK.max() >= experts or (np.diff(ids_TK, axis=1) <= 0).any():
                raise CorruptReply("expert_ids must ascend and name experts of the model")
            return Gated(
                residual_TD,
                wire.decode_rows(reply.expert_input, (tokens, width), "expert_input"),
                ids_TK,
                wire.decode_finite(reply.weights, (tokens, top_k), "weights"),
            )

        request = GateRequest(
            layer=call.layer, rows=wire.encode(call.x_TD), lengths=wire.encode(call.lengths_B), places=self._places
        )
        return await self._mesh.gating.call("Gate", request, self._deadline, read, at=self._home)

    async def _score(self, call: Score) -> Scores:
        shape = (len(call.lengths_B), len(self._spec.head.labels))

        def read(reply: ScoreResponse, origin: Origin) -> Scores:
            self._note(origin)
            if self._spec.generates:
                vocab = self._spec.embedding.vocab
                return Scores(wire.decode_finite(reply.logits, (len(call.x_TD), vocab), "logits"), None)
            logits_BC = wire.decode_finite(reply.logits, shape, "logits")
            return Scores(logits_BC, wire.decode_finite(reply.probabilities, shape, "probabilities"))

        request = ScoreRequest(rows=wire.encode(call.x_TD), lengths=wire.encode(call.lengths_B))
        return await self._mesh.classifier.call("Score", request, self._deadline, read)

    async def _apply(self, call: ApplyExperts) -> Rows:
        out_ND: Rows = np.empty(call.rows_ND.shape, np.float32)
        rows_ND = wire.narrow(call.rows_ND, self._mesh.wire_dtype) if self._mesh.narrows else call.rows_ND
        await self._apply_all(call.layer, call.slices(), rows_ND, out_ND)
        return out_ND

    async def _apply_all(self, layer: int, work: Sequence[tuple[int, slice]], rows_ND: Rows, out_ND: Rows) -> None:
        """One message to each expert service that has rows, all at once; more where one would be too large."""
        service2work: dict[ReplicaSet, list[tuple[int, slice]]] = {}
        for expert, rows in work:
            service2work.setdefault(self._mesh.holder(layer, expert), []).append((expert, rows))
        tasks = [
            asyncio.create_task(self._apply_at(service, layer, message, rows_ND, out_ND))
            for service, held in service2work.items()
            for message in messages(held, self._mesh.message_rows)
        ]
        try:
            await asyncio.gather(*tasks)
        except BaseException:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _apply_at(
        self, service: ReplicaSet, layer: int, work: list[tuple[int, slice]], rows_ND: Rows, out_ND: Rows
    ) -> None:
        experts = [expert for expert, _ in work]
        sent_ND = np.concatenate([rows_ND[rows] for _, rows in work])
        digests = [self._mesh.expert_digest(layer, expert) for expert in experts]

        def read(reply: ApplyResponse, origin: Origin) -> Rows:
            if reply.layer != layer or list(reply.experts) != experts or list(reply.digests) != digests:
                raise CorruptReply("it is of another layer, expert or weight than was asked for")
            self._note(origin)
            return wire.widen(wire.decode_rows(reply.rows, sent_ND.shape, "rows"))

        request = ApplyRequest(
            layer=layer,
            experts=experts,
            counts=[rows.stop - rows.start for _, rows in work],
            rows=wire.encode(sent_ND),
        )
        try:
            given_ND = await service.call("Apply", request, self._deadline, read)
        except Unavailable as error:
            if service.live:
                raise expert_unavailable(error, layer, experts[0]) from None
            await self._apply_all(layer, work, rows_ND, out_ND)  # by others that hold these experts, if there are any
            return
        start = 0
        for _, rows in work:
            stop = start + rows.stop - rows.start
            out_ND[rows] = given_ND[start:stop]
            start = stop

    def _note(self, origin: Origin) -> None:
        self.profiles.add(origin.profile)


def messages(work: Sequence[tuple[int, slice]], most_rows: int) -> list[list[tuple[int, slice]]]:
    """Cuts the rows of one service into messages.

    Args:
        work: (expert, rows) of each expert, ascending.
        most_rows: Most rows in a message.

    Returns:
        For each message (expert, rows), every expert at most once.
    """
    cut: list[list[tuple[int, slice]]] = [[]]
    room = most_rows
    for expert, rows in work:
        start = rows.start
        while start < rows.stop:
            if not room:
                cut.append([])
                room = most_rows
            stop = min(rows.stop, start + room)
            cut[-1].append((expert, slice(start, stop)))
            room -= stop - start
            start = stop
    return cut
