"""Gating replicas as the homes of sequences: where their KV caches are, and how steps are computed there."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from expertmesh.dispatch import Gate, Score, StageCall, drive_async, layer_loop
from expertmesh.errors import (
    CorruptReply,
    DeadlineExceeded,
    InvalidInput,
    MeshError,
    NotFinite,
    Overloaded,
    Unavailable,
    WrongPart,
)
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.replicas.replica import Replica
from expertmesh.serving.generation import Generation
from expertmesh.serving.home import HomeLost
from expertmesh.serving.inspection import Observer, chunks
from expertmesh.serving.passes import PROFILE_SEPARATOR, ExpertTokens, Provenance
from expertmesh.serving.steps import Work
from expertmesh.telemetry import tracing
from expertmesh.v1.gating_pb2 import OpenRequest, Place, ReleaseRequest
from expertmesh.v1.inference_pb2 import ROUTE_MESH
from expertmesh.v1.sampling_pb2 import TokenLogprobs

from .expert_calls import Absence, Rows
from .mesh import Mesh
from .stage_calls import StageCalls

CALL_TIMEOUT_S = 5.0
STEP_TIMEOUT_S = 60.0
MOST_RELEASED = 1024  # in one call
LOSSES = (Unavailable, CorruptReply, WrongPart)


class GatingHome:
    """One gating replica.

    Args:
        mesh: The services.
        replica: The one of gating.
    """

    def __init__(self, mesh: Mesh, replica: Replica) -> None:
        self._mesh = mesh
        self._replica = replica
        self._owed: set[bytes] = set()  # sequences that it may hold though nobody wants them
        self._held: set[bytes] = set()
        self.degraded = DegradedHome(self)

    @property
    def is_live(self) -> bool:
        """Whether it takes sequences."""
        return self._replica in self._mesh.gating.live

    @property
    def is_leaving(self) -> bool:
        """Whether its sequences are better off elsewhere: it drains or left the mesh, and there is another home."""
        live = self._mesh.gating.live
        return bool(live) and self._replica not in live

    async def open(self, generation: Generation) -> None:
        """Reserves room for a sequence.

        Raises:
            Overloaded: There is none just now.
            InvalidInput: There never will be.
            HomeLost: The replica is gone or was wrong.
        """
        await self._open(generation.id, generation.epoch, generation.most_tokens)

    async def release(self, generations: Sequence[Generation]) -> None:
        """Frees sequences."""
        await self._release([generation.id for generation in generations])

    async def step(
        self, work: Sequence[Work], degrades: bool = False
    ) -> tuple[list[TokenLogprobs], Sequence[Provenance]]:
        """Computes rows and draws tokens, one for each work that draws, in their order; says how, for each work.

        Args:
            work: The rows.
            degrades: Whether experts that are dead are left out.

        Raises:
            HomeLost: What was cached here is lost.
            Unavailable: A stage is gone, refused what the mesh asked of it, or took too long.
            CorruptReply: Another stage was wrong.
        """
        try:
            return await self._step(work, degrades)
        except (
            InvalidInput,
            WrongPart,
            Overloaded,
        ) as error:  # whatever a caller asked for, the request was the mesh's
            raise Unavailable(f"a stage refused a step: {error}", "gateway") from None
        except DeadlineExceeded:
            raise Unavailable(f"a step took longer than {STEP_TIMEOUT_S:.0f} s", "gateway") from None

    async def _step(self, work: Sequence[Work], degrades: bool) -> tuple[list[TokenLogprobs], Sequence[Provenance]]:
        pieces = [piece.generation for piece in work]
        places = [Place(sequence=one.id, epoch=one.epoch, position=one.cached) for one in pieces]
        deadline = Deadline.after(STEP_TIMEOUT_S)
        absence = Absence.of(degrades, len(work))
        calls = StageCalls(self._mesh, deadline, places, self._replica, self._mesh.shared_apart, absence)
        ids_T = np.array([id_ for one in work for id_ in one.ids], np.int32)
        lengths_B = np.array([one.rows for one in work], np.int32)
        expert_tokens = ExpertTokens(self._mesh.manifest.spec, lengths_B) if degrades else None
        with tracing.span("step", rows=len(ids_T), sequences=len(work)):
            x_TD = await self._rows(calls, ids_T, lengths_B, expert_tokens.observe if expert_tokens else None)
            lasts = [last for last, one in zip(np.cumsum(lengths_B) - 1, work, strict=True) if one.draws]
            draws = [one.generation.draw() for one in work if one.draws]
            tokens = await calls.sample(x_TD[lasts], draws) if draws else []
        provenance = Provenance(ROUTE_MESH, calls.is_exact, PROFILE_SEPARATOR.join(sorted(calls.profiles)))
        if expert_tokens is None:
            return tokens, [provenance] * len(work)
        return tokens, [provenance.without(missing) for missing in expert_tokens.missing_B]

    async def inspect(self, ids: Sequence[int], chunk: int, deadline: Deadline, observe: Observer) -> None:
        """Runs one sequence of ids through the layers, so many at a time, and shows every stage call.

        Raises:
            MeshError: It could not be run.
        """
        generation_id, lengths = Generation.new_id(), np.array(ids, np.int32)
        try:
            await self._open(generation_id, 0, len(ids))
            for part in chunks(len(ids), min(chunk or len(ids), self._mesh.step_rows)):
                place = Place(sequence=generation_id, position=part.start)
                calls = StageCalls(self._mesh, deadline, [place], self._replica)
                rows_B = np.array([part.stop - part.start], np.int32)
                x_TD = await self._rows(calls, lengths[part], rows_B, observe)
                score = Score(x_TD, rows_B)
                observe(score, await calls.answer(score))
        except HomeLost as error:
            raise Unavailable(str(error), "gating") from None
        finally:
            await self._release([generation_id])

    async def _rows(self, calls: StageCalls, ids_T: Rows, lengths_B: Rows, observe: Observer | None = None) -> Rows:
        async def answer(call: StageCall) -> Any:
            try:
                result = await calls.answer(call)
            except NotFinite:
                raise
            except LOSSES as error:
                if isinstance(call, Gate):
                    raise HomeLost(str(error)) from None
                raise
            if observe is not None:
                observe(call, result)
            return result

        rows: Rows = await drive_async(layer_loop(self._mesh.manifest.spec, ids_T, lengths_B), answer)
        return rows

    async def _open(self, sequence: bytes, epoch: int, tokens: int) -> None:
        self._owed.discard(sequence)
        if self._owed:
            await self._release([])
        request = OpenRequest(sequence=sequence, epoch=epoch, tokens=tokens)
        self._let_go([sequence])  # until it is certain; the call itself keeps the replica meanwhile
        try:
            await self._mesh.gating.call("Open", request, Deadline.after(CALL_TIMEOUT_S), _taken, at=self._replica)
        except LOSSES as error:
            self._owed.add(sequence)
            raise HomeLost(str(error)) from None
        except DeadlineExceeded:
            self._owed.add(sequence)
            late = f"it did not open a sequence within {CALL_TIMEOUT_S:.0f} s"
            self._replica.lose(late)
            raise HomeLost(late) from None
        self._held.add(sequence)
        self._replica.sequences = len(self._held)

    async def _release(self, sequences: Sequence[bytes]) -> None:
        """What it cannot be told now, it is told before something is opened; and by itself it forgets in a while."""
        self._owed.update(sequences)
        self._let_go(sequences)
        told = list(self._owed)[-MOST_RELEASED:]
        request = ReleaseRequest(sequences=told)
        with suppress(MeshError):
            await self._mesh.gating.call("Release", request, Deadline.after(CALL_TIMEOUT_S), _taken, at=self._replica)
            self._owed.difference_update(told)

    def _let_go(self, sequences: Sequence[bytes]) -> None:
        self._held.difference_update(sequences)
        self._replica.sequences = len(self._held)


class Homes:
    """The homes there are: one for every gating replica, as these come and go.

    Args:
        mesh: The services.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._replica2home: dict[Replica, GatingHome] = {}

    def all(self) -> list[GatingHome]:
        """The homes of just now; that of a replica stays the same as long as there is the replica."""
        known, replicas = self._replica2home, self._mesh.gating.replicas
        if list(known) != replicas:
            self._replica2home = {one: known.get(one) or GatingHome(self._mesh, one) for one in replicas}
        return list(self._replica2home.values())


class DegradedHome:
    """The same replica for sequences that may do without dead experts; these have steps of their own.

    Args:
        home: The replica.
    """

    def __init__(self, home: GatingHome) -> None:
        self._home = home
        self.open, self.release = home.open, home.release

    @property
    def is_live(self) -> bool:
        """Whether it takes sequences."""
        return self._home.is_live

    @property
    def is_leaving(self) -> bool:
        """Whether its sequences are better off elsewhere."""
        return self._home.is_leaving

    async def step(self, work: Sequence[Work]) -> tuple[list[TokenLogprobs], Sequence[Provenance]]:
        """As `GatingHome.step`, without the experts that are dead."""
        return await self._home.step(work, degrades=True)


def _taken(reply: Any, origin: Any) -> None:
    """There is nothing to read."""
