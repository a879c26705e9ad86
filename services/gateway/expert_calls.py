"""Experts of one layer, by RPC: one call to each expert service that has rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

from expertmesh import wire
from expertmesh.dispatch import Applied, ApplyExperts
from expertmesh.errors import CorruptReply, NotFinite, Unavailable
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas.asked import Asked
from expertmesh.rpc.replicas.replica_set import ReplicaSet
from expertmesh.rpc.replicas.together import take_together
from expertmesh.v1.expert_pb2 import ApplyRequest, ApplyResponse

from .holders import expert_unavailable
from .mesh import Mesh

Rows = npt.NDArray[Any]
Work = Sequence[tuple[int, slice]]  # (expert, its rows)


class Absence(Enum):
    """What is done about experts that cannot be had.

    Attributes:
        FAILS: The calls fail.
        LEAVES_OUT_DEAD: Those without a live replica are left out.
        LEAVES_OUT_BROKEN: Those of which nothing finite comes as well; only for one text or sequence by itself, since
            it may be the input that nothing finite comes of, and nobody else should miss an expert for that.
    """

    FAILS = "fails"
    LEAVES_OUT_DEAD = "leaves out dead"
    LEAVES_OUT_BROKEN = "leaves out broken"

    @staticmethod
    def of(degrades: bool, company: int) -> Absence:
        """What goes for so many texts or sequences together."""
        if not degrades:
            return Absence.FAILS
        return Absence.LEAVES_OUT_BROKEN if company == 1 else Absence.LEAVES_OUT_DEAD


@dataclass(frozen=True, eq=False, slots=True)
class _Layer:
    """The experts of one layer at work.

    Attributes:
        number: Of the layer.
        rows_ND: What they are given.
        out_ND: Where their rows go.
        missing: Experts that are left out.
    """

    number: int
    rows_ND: Rows
    out_ND: Rows
    missing: set[int] = field(default_factory=set)


@dataclass(frozen=True, eq=False, slots=True)
class _Message:
    """Rows of one or several experts, sent to one service."""

    service: ReplicaSet
    work: Work
    asked: Asked[Rows]


class ExpertCalls:
    """Asks expert services.

    Args:
        mesh: The services.
        deadline: Of all these calls together.
        note: Is told who computed.
        absence: What is done about experts that cannot be had.
    """

    def __init__(
        self, mesh: Mesh, deadline: Deadline, note: Callable[[Origin], None], absence: Absence = Absence.FAILS
    ) -> None:
        self._mesh = mesh
        self._deadline = deadline
        self._note = note
        self._absence = absence

    async def apply(self, call: ApplyExperts) -> Applied:
        """The rows of routed experts.

        Raises:
            Unavailable: No replica of an expert is left that gives what can be right; names it.
            NotFinite: Nothing finite comes of an expert; names it.
            MeshError: It failed for another reason.
        """
        out_ND: Rows = np.empty(call.rows_ND.shape, np.float32)
        rows_ND = wire.narrow(call.rows_ND, self._mesh.wire_dtype) if self._mesh.narrows else call.rows_ND
        layer = _Layer(call.layer, rows_ND, out_ND)
        await self._apply_all(layer, call.slices())
        return Applied(out_ND, missing=sorted(layer.missing)) if layer.missing else Applied(out_ND)

    async def _apply_all(self, layer: _Layer, work: Work) -> None:
        """One message to each expert service that has rows, all at once; more where one would be too large."""
        service2work: dict[ReplicaSet, list[tuple[int, slice]]] = {}
        for expert, rows in work:
            try:
                service = self._mesh.holders.of(layer.number, expert)
            except Unavailable as error:
                self._miss(layer, [expert], error)
            else:
                service2work.setdefault(service, []).append((expert, rows))
        most_rows = self._mesh.message_rows
        await self._exchange(layer, {service: messages(held, most_rows) for service, held in service2work.items()})

    async def _exchange(self, layer: _Layer, service2parts: Mapping[ReplicaSet, Sequence[Work]]) -> None:
        """Sends every part of the work in a message, all at once, and puts what comes back where it belongs.

        As long as nothing is wrong with an answer, each is taken as it comes; then those that are left get tasks.
        """
        sent: list[_Message] = []
        try:
            for service, parts in service2parts.items():
                for part in parts:
                    sent.append(self._send(service, layer, part))
            left: Sequence[int] = range(len(sent))
            if len(sent) > 1:
                calls = [one.asked for one in sent]
                left = await take_together(calls, lambda number: self._take(layer, sent[number]), self._mesh.alarms)
            if left:
                await all_of([self._receive(layer, sent[number]) for number in left])
        finally:
            for one in sent:
                one.asked.abandon()

    def _send(self, service: ReplicaSet, layer: _Layer, work: Work) -> _Message:
        experts = [expert for expert, _ in work]
        rows_ND = layer.rows_ND
        sent_ND = rows_ND[work[0][1]] if len(work) == 1 else np.concatenate([rows_ND[rows] for _, rows in work])
        digests = [self._mesh.holders.digest(layer.number, expert) for expert in experts]

        def read(reply: ApplyResponse, origin: Origin) -> Rows:
            if reply.layer != layer.number or list(reply.experts) != experts or list(reply.digests) != digests:
                raise CorruptReply("it is of another layer, expert or weight than was asked for")
            self._note(origin)
            return wire.widen(wire.decode_rows(reply.rows, sent_ND.shape, "rows"))

        request = ApplyRequest(
            layer=layer.number,
            experts=experts,
            counts=[rows.stop - rows.start for _, rows in work],
        )
        wire.fill(request.rows, sent_ND)
        return _Message(service, work, service.begin("Apply", request, self._deadline, read))

    def _take(self, layer: _Layer, message: _Message) -> None:
        self._put(layer, message.work, message.service.take(message.asked))

    async def _receive(self, layer: _Layer, message: _Message) -> None:
        service, work = message.service, message.work
        try:
            self._put(layer, work, await service.finish(message.asked))
        except NotFinite as error:
            await self._not_finite(error, service, layer, work)
        except (Unavailable, CorruptReply) as error:
            if service.live:
                expert = work[0][0]
                self._miss(layer, [one for one, _ in work], expert_unavailable(error, layer.number, expert))
            else:
                await self._apply_all(layer, work)  # by others that hold these experts, if there are any

    @staticmethod
    def _put(layer: _Layer, work: Work, given_ND: Rows) -> None:
        """Puts rows that have come where they belong."""
        start = 0
        for _, rows in work:
            stop = start + rows.stop - rows.start
            layer.out_ND[rows] = given_ND[start:stop]
            start = stop

    async def _not_finite(self, error: NotFinite, service: ReplicaSet, layer: _Layer, work: Work) -> None:
        """Of a message with several experts each is asked for by itself, to learn whose rows they are."""
        if self._absence is Absence.LEAVES_OUT_BROKEN and len(work) > 1:
            await self._exchange(layer, {service: [[one] for one in work]})
            return
        expert = work[0][0]
        error.layer, error.expert = layer.number, expert
        if self._absence is not Absence.LEAVES_OUT_BROKEN:
            raise error
        layer.missing.add(expert)

    def _miss(self, layer: _Layer, experts: Sequence[int], error: Unavailable) -> None:
        """Leaves experts out, if that may be."""
        if self._absence is Absence.FAILS:
            raise error
        layer.missing.update(experts)


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
