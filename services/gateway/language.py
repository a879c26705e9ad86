"""Tokens through the mesh, or from the full model when the contract allows and the mesh cannot; text through either."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from expertmesh import wire
from expertmesh.errors import CorruptReply, NotFinite, Unavailable
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.origin import Origin
from expertmesh.serving.generation import NO_LOGPROBS, Token, Wish, Witnesses
from expertmesh.serving.inspection import Trace
from expertmesh.serving.passes import Provenance, are_exact
from expertmesh.serving.scheduler import Scheduler, StepLimits
from expertmesh.v1.inference_pb2 import (
    FINISH_REASON_LENGTH,
    FINISH_REASON_STOP,
    FINISH_REASON_UNSPECIFIED,
    ROUTE_FULL_MODEL,
    ROUTE_MESH,
    Contract,
    FinishReason,
    GenerateRequest,
    GenerateResponse,
    Route,
    TokenIds,
)
from expertmesh.v1.inspection_pb2 import InspectRequest, InspectResponse
from expertmesh.v1.tokenizer_pb2 import (
    DecodeBatchRequest,
    DecodeBatchResponse,
    EncodePromptRequest,
    EncodePromptResponse,
)

from .homes import Homes
from .mesh import Mesh
from .stage_calls import check_token
from .ways import FAILURES, Way, Ways, told

ROUTES = {Way.MESH: ROUTE_MESH, Way.FULL_MODEL: ROUTE_FULL_MODEL, Way.DEGRADED: ROUTE_MESH}  # where nothing is missing
ReplyT = TypeVar("ReplyT")


class RoutedTokens:
    """Tokens of sequences, through the mesh or the full model.

    Args:
        mesh: The services.
        limits: How much is taken on.
    """

    def __init__(self, mesh: Mesh, limits: StepLimits) -> None:
        self._mesh = mesh
        self._homes = Homes(mesh)
        limits = replace(limits, rows=min(limits.rows, mesh.step_rows))
        self._scheduler = Scheduler(self._homes.all, limits, lambda: mesh.gating.unavailable())
        self._degraded = Scheduler(
            lambda: [home.degraded for home in self._homes.all()], limits, lambda: mesh.gating.unavailable()
        )
        mesh.on_change = self._wake

    async def tokens(self, wish: Wish, contract: Contract, route: Route) -> AsyncGenerator[Token, None]:
        """The tokens of one sequence as they come.

        Where the mesh fails in the middle, the full model goes on from the tokens there are, which are the same bits;
        and where that fails, or is none, the mesh does without dead experts, if it may. Such sequences have steps of
        their own, so that nobody else's lacks an expert.

        Raises:
            Unavailable: No route that the contract allows has every stage; names the stage or expert.
            MeshError: It failed for another reason.
        """
        known: list[int] = []
        witnesses = Witnesses()
        ways = Ways(self._mesh, contract, route)
        while True:
            try:
                async with aclosing(self._by(ways.now, wish, known)) as tokens:
                    async for token in tokens:
                        known.append(token.drawn.id)
                        witnesses.add(token.provenance)
                        ways.served()
                        if ways.have_turned:
                            token = replace(token, provenance=witnesses.provenance(ROUTES[ways.now]))
                        yield token
                return
            except FAILURES as error:
                ways.turn(error)

    async def inspect(self, request: InspectRequest, deadline: Deadline) -> InspectResponse:
        """Gives the trace of one sequence of ids by the route that is asked for, and by no other."""
        if request.route == ROUTE_FULL_MODEL:
            full_model = self._mesh.require_full_model()
            return await full_model.call("Inspect", request, deadline, lambda reply, _: reply)
        home = next((home for home in self._homes.all() if home.is_live), None)
        if home is None:
            raise self._mesh.gating.unavailable()
        trace = Trace()
        ids_T = wire.decode_ids(request.ids, self._mesh.manifest.spec.embedding.vocab)
        await home.inspect(ids_T.tolist(), request.chunk, deadline, trace.observe)
        return trace.response

    def close(self) -> None:
        """Ends the steps, when the program ends."""
        self._scheduler.close()
        self._degraded.close()

    def _wake(self) -> None:
        self._scheduler.wake()
        self._degraded.wake()

    def _by(self, way: Way, wish: Wish, known: list[int]) -> AsyncGenerator[Token, None]:
        """The tokens behind those that are known; whoever reads these appends them there."""
        match way:
            case Way.MESH:
                self._mesh.require_complete()
                return self._scheduler.generate(wish, tuple(known))
            case Way.FULL_MODEL:
                return self._by_full_model(wish, known)
            case Way.DEGRADED:
                self._mesh.require_stages()
                return self._degraded.generate(wish, tuple(known))

    async def _by_full_model(self, wish: Wish, known: list[int]) -> AsyncGenerator[Token, None]:
        full_model = self._mesh.require_full_model()
        tries = len(full_model.replicas)

        def read(reply: GenerateResponse) -> list[Token]:
            return self._read(reply, wish)

        while True:
            tries -= 1
            try:
                request = self._resumed(wish, known)
                replies = full_model.stream("Generate", request, wish.deadline, read)
                async with aclosing(replies) as messages:
                    async for token in messages:
                        yield token
                        if token.finish != FINISH_REASON_UNSPECIFIED:
                            return
                raise CorruptReply("full_model ended a stream before its last token", "full_model")
            except NotFinite:
                raise
            except (Unavailable, CorruptReply):
                if not tries or not full_model.live:
                    raise

    def _read(self, reply: GenerateResponse, wish: Wish) -> list[Token]:
        for drawn in reply.tokens:
            check_token(drawn, wish.logprobs, self._mesh.manifest.spec.embedding.vocab)
        provenance = Provenance(ROUTE_FULL_MODEL, are_exact({reply.profile}), reply.profile)
        finish: list[FinishReason] = [FINISH_REASON_UNSPECIFIED] * len(reply.tokens)
        if reply.finish_reason != FINISH_REASON_UNSPECIFIED:
            if not finish or reply.finish_reason not in (FINISH_REASON_STOP, FINISH_REASON_LENGTH):
                raise CorruptReply("it ends without a token")
            finish[-1] = reply.finish_reason
        return [Token(drawn, why, provenance) for drawn, why in zip(reply.tokens, finish, strict=True)]

    def _resumed(self, wish: Wish, known: Sequence[int]) -> GenerateRequest:
        """A request that goes on with a sequence: random numbers depend on seed, choice and position alone."""
        sampling = wish.sampling
        own_ids = frozenset(self._mesh.manifest.spec.head.end_ids)
        ends = own_ids <= wish.end_ids
        return GenerateRequest(
            ids=TokenIds(ids=[*wish.prompt, *known]),
            max_tokens=wish.max_tokens - len(known),
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            seed=sampling.seed,
            stop_ids=sorted(wish.end_ids - own_ids if ends else wish.end_ids),
            ignore_end=not ends,
            first_choice=wish.choice,
            logprobs=None if wish.logprobs == NO_LOGPROBS else wish.logprobs,
            route=ROUTE_FULL_MODEL,
        )


class RoutedTokenizing:
    """Text to ids and back by the tokenizer, or the full model's where that is gone: they are the same files.

    Args:
        mesh: The services.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._vocab = mesh.manifest.spec.embedding.vocab

    async def encode(self, request: EncodePromptRequest, deadline: Deadline) -> list[int]:
        """Ids of a prompt."""

        def read(reply: EncodePromptResponse, origin: Origin) -> list[int]:
            ids: list[int] = wire.decode_ids(reply.ids, self._vocab).tolist()
            return ids

        return await self._call("EncodePrompt", request, deadline, read)

    async def decode(self, sequences: Sequence[Sequence[int]], deadline: Deadline) -> list[str]:
        """Texts of several id sequences."""

        def read(reply: DecodeBatchResponse, origin: Origin) -> list[str]:
            if len(reply.texts) != len(sequences):
                raise CorruptReply("it has not one text for each sequence")
            return list(reply.texts)

        request = DecodeBatchRequest(
            ids=wire.encode(np.concatenate([np.array(one, np.int32) for one in sequences])),
            lengths=wire.encode(np.array([len(one) for one in sequences], np.int32)),
        )
        return await self._call("DecodeBatch", request, deadline, read)

    async def _call(
        self, method: str, request: Any, deadline: Deadline, read: Callable[[Any, Origin], ReplyT]
    ) -> ReplyT:
        try:
            return await self._mesh.tokenizer.call(method, request, deadline, read)
        except FAILURES as error:
            failed = told(error)
        if self._mesh.has_full_model:
            with suppress(*FAILURES):
                return await self._mesh.require_full_model().call(method, request, deadline, read)
        raise failed
