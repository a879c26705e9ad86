"""A language model in one process: the home of every sequence, and its own tokenizer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from time import perf_counter
from typing import TypeVar, cast

import grpc.aio
import numpy as np
import torch

from expertmesh import wire
from expertmesh.dispatch import Score, Scores
from expertmesh.errors import InvalidInput, Unavailable
from expertmesh.model.head import LanguageHead
from expertmesh.model.sampling import sample
from expertmesh.rpc.deadline import Deadline
from expertmesh.serving.generation import Generation, Token, Wish
from expertmesh.serving.inspection import Observer, Trace, chunks
from expertmesh.serving.leases import Leases, Place
from expertmesh.serving.passes import Provenance, are_exact
from expertmesh.serving.sampling import decode_draw, encode_token
from expertmesh.serving.scheduler import Scheduler, StepLimits
from expertmesh.serving.stage import Stage
from expertmesh.serving.steps import Work
from expertmesh.serving.tokenizing import TokenizerServicer
from expertmesh.telemetry import metrics
from expertmesh.v1.inference_pb2 import CONTRACT_MESH_ONLY, ROUTE_FULL_MODEL, ROUTE_MESH, Contract, Route
from expertmesh.v1.inspection_pb2 import InspectRequest, InspectResponse
from expertmesh.v1.sampling_pb2 import TokenLogprobs
from expertmesh.v1.tokenizer_pb2 import DecodeBatchRequest, EncodePromptRequest

ResultT = TypeVar("ResultT")
NO_CALL = cast(grpc.aio.ServicerContext, None)  # the tokenizer's methods do not look at it


class LocalHome:
    """Computes steps in this process, in one thread of its own so that health and metrics answer meanwhile.

    Args:
        stage: Device and loader.
        leases: The KV cache.
    """

    is_live = True
    is_leaving = False

    def __init__(self, stage: Stage, leases: Leases) -> None:
        self._stage = stage
        self._work = metrics.Work("full_model")
        self._leases = leases
        self._model = stage.loader.full_model()
        self._head = cast(LanguageHead, self._model.classifier)
        threads = torch.get_num_threads()
        self._thread = ThreadPoolExecutor(1, "model", initializer=torch.set_num_threads, initargs=(threads,))
        self._provenance = Provenance(ROUTE_FULL_MODEL, are_exact({stage.profile.name}), stage.profile.name)
        self._warm_up()  # nobody waits for what only the first run does

    async def open(self, generation: Generation) -> None:
        """Reserves room for a sequence.

        Raises:
            Overloaded: There is none just now.
            InvalidInput: There never will be.
        """
        self._leases.open(generation.id, generation.epoch, generation.most_tokens)

    async def release(self, generations: Sequence[Generation]) -> None:
        """Frees sequences."""
        self._leases.release([generation.id for generation in generations])

    async def step(self, work: Sequence[Work]) -> tuple[list[TokenLogprobs], Sequence[Provenance]]:
        """Computes rows and draws tokens, one for each work that draws, in their order; says how, for each work."""
        return await self._in_thread(lambda: self._step(work)), [self._provenance] * len(work)

    async def inspect(self, ids: Sequence[int], chunk: int, observe: Observer) -> None:
        """Runs one sequence of ids through the layers, so many at a time, and shows every stage call."""
        sequence = Generation.new_id()
        self._leases.open(sequence, 0, len(ids))
        try:
            await self._in_thread(lambda: self._observed(sequence, ids, chunk, observe))
        finally:
            self._leases.release([sequence])

    async def _in_thread(self, work: Callable[[], ResultT]) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    def _step(self, work: Sequence[Work]) -> list[TokenLogprobs]:
        started_s = perf_counter()
        ids_T = [id_ for one in work for id_ in one.ids]
        places = [Place(one.generation.id, one.generation.epoch, one.generation.cached, one.rows) for one in work]
        ends = np.cumsum([one.rows for one in work]) - 1
        lasts = [int(end) for end, one in zip(ends, work, strict=True) if one.draws]
        draws = [decode_draw(one.generation.draw(), self._stage.spec.embedding.vocab) for one in work if one.draws]
        tokens = []
        with torch.inference_mode():
            x_TD = self._model.rows(self._ids(ids_T), self._leases.rows(places))
            if draws:
                tokens = sample(self._head(x_TD[lasts]), draws)
        self._work.done(len(ids_T), perf_counter() - started_s)
        return [encode_token(token) for token in tokens]

    def _observed(self, sequence: bytes, ids: Sequence[int], chunk: int, observe: Observer) -> None:
        with torch.inference_mode():
            for part in chunks(len(ids), chunk):
                layout = self._leases.rows([Place(sequence, 0, part.start, part.stop - part.start)])
                x_TD = self._model.rows(self._ids(ids[part]), layout, observe)
                observe(Score(x_TD, layout.lengths_B), Scores(self._head(x_TD), None))

    def _warm_up(self) -> None:
        sequence = Generation.new_id()
        self._leases.open(sequence, 0, 3)
        self._observed(sequence, [0, 0, 0], 0, lambda call, result: None)
        self._leases.release([sequence])

    def _ids(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor(ids, dtype=torch.int64, device=self._stage.device)


class LocalTokens:
    """Tokens of sequences that run in this process.

    Args:
        spec_vocab: Tokens of the model.
        home: Where they are computed.
        limits: How much is taken on.
    """

    def __init__(self, spec_vocab: int, home: LocalHome, limits: StepLimits) -> None:
        self._vocab = spec_vocab
        self._home = home
        self._scheduler = Scheduler(lambda: [home], limits, lambda: Unavailable("stopping", "full_model"))

    async def tokens(self, wish: Wish, contract: Contract, route: Route) -> AsyncGenerator[Token, None]:
        """The tokens of one sequence as they come.

        Raises:
            InvalidInput: The caller wants the mesh, which this is not.
        """
        if route == ROUTE_MESH or contract == CONTRACT_MESH_ONLY:
            raise InvalidInput("this is the full model; ask the gateway for the mesh", "route")
        async with aclosing(self._scheduler.generate(wish)) as tokens:
            async for token in tokens:
                yield token

    def close(self) -> None:
        """Ends the steps, when the program ends."""
        self._scheduler.close()

    async def inspect(self, request: InspectRequest, deadline: Deadline) -> InspectResponse:
        """Gives the trace of one sequence of ids."""
        trace = Trace()
        ids_T = wire.decode_ids(request.ids, self._vocab)
        await self._home.inspect(ids_T.tolist(), request.chunk, trace.observe)
        return trace.response


class LocalTokenizing:
    """Text to ids and back by the servicer that offers it to others as well.

    Args:
        servicer: The tokenizer.
    """

    def __init__(self, servicer: TokenizerServicer) -> None:
        self._servicer = servicer

    async def encode(self, request: EncodePromptRequest, deadline: Deadline) -> list[int]:
        """Ids of a prompt."""
        reply = await self._servicer.EncodePrompt(request, NO_CALL)
        ids: list[int] = wire.decode(reply.ids, wire.INT32, (None,), "ids").tolist()
        return ids

    async def decode(self, sequences: Sequence[Sequence[int]], deadline: Deadline) -> list[str]:
        """Texts of several id sequences."""
        request = DecodeBatchRequest(
            ids=wire.encode(np.concatenate([np.array(one, np.int32) for one in sequences])),
            lengths=wire.encode(np.array([len(one) for one in sequences], np.int32)),
        )
        return list((await self._servicer.DecodeBatch(request, NO_CALL)).texts)
