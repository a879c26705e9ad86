"""Stage calls of the layer loop, answered by RPC: one call to a stage, or one to each expert service that has rows."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from math import inf
from typing import Any

import numpy as np
import numpy.typing as npt

from expertmesh import wire
from expertmesh.dispatch import Applied, ApplyExperts, Embed, Gate, Gated, Score, Scores, StageCall
from expertmesh.errors import CorruptReply, Unavailable
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replica import Replica
from expertmesh.rpc.replicas import ReplicaSet
from expertmesh.serving.passes import Stopwatch, are_exact
from expertmesh.v1.classifier_pb2 import Draw, SampleRequest, SampleResponse, ScoreRequest, ScoreResponse
from expertmesh.v1.embedding_pb2 import EmbedRequest, EmbedResponse
from expertmesh.v1.expert_pb2 import ApplyRequest, ApplyResponse
from expertmesh.v1.gating_pb2 import GateRequest, GateResponse, Place, ShareRequest, ShareResponse
from expertmesh.v1.sampling_pb2 import TokenLogprob, TokenLogprobs

from .mesh import Mesh, expert_unavailable

MOST_LOGPROB = 1e-3  # rounding may lift a certain token a little above 0
Rows = npt.NDArray[Any]


class StageCalls:
    """Answers stage calls, and remembers who computed.

    Args:
        mesh: The services.
        deadline: Of all these calls together.
        places: Where the rows of each sequence belong in the KV cache, for a model that has one.
        home: The gating replica that has them.
        shared_apart: Whether shared experts run while the routed ones do, where there are some.

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
    ) -> None:
        self._shared_apart = shared_apart and mesh.manifest.spec.dense.shared_width > 0
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
            rows=wire.encode(call.x_TD),
            lengths=wire.encode(call.lengths_B),
            places=self._places,
            shared_apart=self._shared_apart,
        )
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
        out_ND: Rows = np.empty(call.rows_ND.shape, np.float32)
        rows_ND = wire.narrow(call.rows_ND, self._mesh.wire_dtype) if self._mesh.narrows else call.rows_ND
        work = [self._apply_all(call.layer, call.slices(), rows_ND, out_ND)]
        shared: list[Rows] = []
        if call.shared_input_TD is not None:
            work.append(self._share(call.layer, call.shared_input_TD, shared))
        await all_of(work)
        return Applied(out_ND, shared[0] if shared else None)

    async def _share(self, layer: int, rows_TD: Rows, out: list[Rows]) -> None:
        def read(reply: ShareResponse, origin: Origin) -> Rows:
            self._note(origin)
            return wire.decode_finite(reply.rows, rows_TD.shape, "rows")

        request = ShareRequest(layer=layer, rows=wire.encode(rows_TD))
        out.append(await self._mesh.gating.call("Share", request, self._deadline, read))

    async def _apply_all(self, layer: int, work: Sequence[tuple[int, slice]], rows_ND: Rows, out_ND: Rows) -> None:
        """One message to each expert service that has rows, all at once; more where one would be too large."""
        service2work: dict[ReplicaSet, list[tuple[int, slice]]] = {}
        for expert, rows in work:
            service2work.setdefault(self._mesh.holder(layer, expert), []).append((expert, rows))
        await all_of(
            [
                self._apply_at(service, layer, message, rows_ND, out_ND)
                for service, held in service2work.items()
                for message in messages(held, self._mesh.message_rows)
            ]
        )

    async def _apply_at(
        self, service: ReplicaSet, layer: int, work: list[tuple[int, slice]], rows_ND: Rows, out_ND: Rows
    ) -> None:
        experts = [expert for expert, _ in work]
        sent_ND = rows_ND[work[0][1]] if len(work) == 1 else np.concatenate([rows_ND[rows] for _, rows in work])
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


async def all_of(work: Sequence[Coroutine[Any, Any, None]]) -> None:
    """Does several things at once; if one fails, the others are cancelled and over when that is told."""
    if len(work) == 1:
        await work[0]
        return
    tasks = [asyncio.create_task(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


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
