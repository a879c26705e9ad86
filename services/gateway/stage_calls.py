"""Stage calls of the layer loop, answered by RPC; those of experts by `expert_calls`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf
from typing import Any

import numpy as np

from expertmesh import wire
from expertmesh.dispatch import Applied, ApplyExperts, Embed, Gate, Gated, Score, Scores, StageCall
from expertmesh.errors import CorruptReply
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas.replica import Replica
from expertmesh.serving.passes import Stopwatch, are_exact
from expertmesh.v1.classifier_pb2 import Draw, SampleRequest, SampleResponse, ScoreRequest, ScoreResponse
from expertmesh.v1.embedding_pb2 import EmbedRequest, EmbedResponse
from expertmesh.v1.gating_pb2 import GateRequest, GateResponse, Place, ShareRequest, ShareResponse
from expertmesh.v1.sampling_pb2 import TokenLogprob, TokenLogprobs

from .expert_calls import Absence, ExpertCalls, Rows, all_of
from .mesh import Mesh

MOST_LOGPROB = 1e-3  # rounding may lift a certain token a little above 0


class StageCalls:
    """Answers stage calls, and remembers who computed.

    Args:
        mesh: The services.
        deadline: Of all these calls together.
        places: Where the rows of each sequence belong in the KV cache, for a model that has one.
        home: The gating replica that has them.
        shared_apart: Whether shared experts run while the routed ones do, where there are some.
        absence: What is done about experts that cannot be had.

    Attributes:
        stopwatch: Where the time went.
        profiles: The numeric profiles of everybody who computed.
    """

    def __init__(
        self,
        mesh: Mesh,
        deadline: Deadline,
        places: Sequence[Place] = (),
        home: Replica | None = None,
        shared_apart: bool = False,
        absence: Absence = Absence.FAILS,
    ) -> None:
        self._shared_apart = shared_apart and mesh.manifest.spec.dense.shared_width > 0
        self._mesh = mesh
        self._spec = mesh.manifest.spec
        self._deadline = deadline
        self._places = places
        self._home = home
        self.stopwatch = Stopwatch()
        self.profiles: set[str] = set()
        self._experts = ExpertCalls(mesh, deadline, self._note, absence)

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
        """The next token of each row; more than one message where one would be too large."""
        tokens: list[TokenLogprobs] = []
        with self.stopwatch.time("classifier"):
            for rows in cut([4 * self._spec.width + draw.ByteSize() + 8 for draw in draws], self._mesh.message_bytes):
                tokens += await self._sample(rows_BD[rows], draws[rows])
        return tokens

    async def _sample(self, rows_BD: Rows, draws: Sequence[Draw]) -> list[TokenLogprobs]:
        def read(reply: SampleResponse, origin: Origin) -> list[TokenLogprobs]:
            if len(reply.tokens) != len(draws):
                raise CorruptReply("it has not one token for each row")
            for token, draw in zip(reply.tokens, draws, strict=True):
                check_token(token, draw.logprobs, self._spec.embedding.vocab)
            self._note(origin)
            return list(reply.tokens)

        request = SampleRequest(rows=wire.encode(rows_BD), draws=draws)
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
                self._shared_apart,
            )

        request = GateRequest(
            layer=call.layer,
            lengths=wire.encode(call.lengths_B),
            places=self._places,
            shared_apart=self._shared_apart,
        )
        wire.fill(request.rows, call.x_TD)
        return await self._mesh.gating.call("Gate", request, self._deadline, read, at=self._home)

    async def _score(self, call: Score) -> Scores:
        if not self._spec.generates:
            return await self._score_sequences(call)
        at_once = max(1, self._mesh.message_bytes // (4 * max(self._spec.embedding.vocab, self._spec.width)))
        starts = range(0, len(call.x_TD), at_once)
        return Scores(np.concatenate([await self._score_rows(call.x_TD[at : at + at_once]) for at in starts]), None)

    async def _score_rows(self, x_TD: Rows) -> Rows:
        def read(reply: ScoreResponse, origin: Origin) -> Rows:
            self._note(origin)
            return wire.decode_finite(reply.logits, (len(x_TD), self._spec.embedding.vocab), "logits")

        request = ScoreRequest(rows=wire.encode(x_TD), lengths=wire.encode(np.array([len(x_TD)], np.int32)))
        return await self._mesh.classifier.call("Score", request, self._deadline, read)

    async def _score_sequences(self, call: Score) -> Scores:
        shape = (len(call.lengths_B), len(self._spec.head.labels))

        def read(reply: ScoreResponse, origin: Origin) -> Scores:
            self._note(origin)
            logits_BC = wire.decode_finite(reply.logits, shape, "logits")
            return Scores(logits_BC, wire.decode_finite(reply.probabilities, shape, "probabilities"))

        request = ScoreRequest(rows=wire.encode(call.x_TD), lengths=wire.encode(call.lengths_B))
        return await self._mesh.classifier.call("Score", request, self._deadline, read)

    async def _apply(self, call: ApplyExperts) -> Applied:
        if call.shared_input_TD is None:
            return await self._experts.apply(call)
        shared: list[Rows] = []
        applied: list[Applied] = []

        async def routed() -> None:
            applied.append(await self._experts.apply(call))

        await all_of([routed(), self._share(call.layer, call.shared_input_TD, shared)])
        return replace(applied[0], shared_TD=shared[0])

    async def _share(self, layer: int, rows_TD: Rows, out: list[Rows]) -> None:
        def read(reply: ShareResponse, origin: Origin) -> Rows:
            self._note(origin)
            return wire.decode_finite(reply.rows, rows_TD.shape, "rows")

        request = ShareRequest(layer=layer, rows=wire.encode(rows_TD))
        out.append(await self._mesh.gating.call("Share", request, self._deadline, read))

    def _note(self, origin: Origin) -> None:
        self.profiles.add(origin.profile)


def check_token(token: TokenLogprobs, logprobs: int, vocab: int) -> None:
    """Refuses a token that a head cannot have drawn.

    Args:
        token: The token.
        logprobs: How many of the likeliest tokens were asked for; negative for no log probability at all.
        vocab: Tokens of the model.

    Raises:
        CorruptReply: It is not in the vocabulary, or its log probabilities cannot be right.
    """
    told: list[TokenLogprobs | TokenLogprob] = [token, *token.top]
    if not all(0 <= one.id < vocab for one in told):
        raise CorruptReply("a token is not in the vocabulary")
    if len(token.top) != min(max(logprobs, 0), vocab):
        raise CorruptReply("it has not as many log probabilities as were asked for")
    if logprobs >= 0 and not all(-inf < one.logprob <= MOST_LOGPROB for one in told):
        raise CorruptReply("a log probability cannot be right")


def cut(sizes: Sequence[int], most: int) -> list[slice]:
    """Cuts items into runs whose sizes sum to at most `most`; one that is larger stands alone."""
    starts, total = [0], 0
    for index, size in enumerate(sizes):
        total += size
        if total > most and index > starts[-1]:
            starts.append(index)
            total = size
    return [slice(start, stop) for start, stop in zip(starts, [*starts[1:], len(sizes)], strict=True)]
