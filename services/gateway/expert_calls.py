"""Experts of one layer, by RPC: one call to each expert service that has rows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expertmesh import wire
from expertmesh.dispatch import Applied, ApplyExperts
from expertmesh.errors import CorruptReply, Unavailable
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.origin import Origin
from expertmesh.rpc.replicas import ReplicaSet
from expertmesh.v1.expert_pb2 import ApplyRequest, ApplyResponse

from .mesh import Mesh, expert_unavailable

Rows = npt.NDArray[Any]
Work = Sequence[tuple[int, slice]]  # (expert, its rows)


@dataclass(frozen=True, eq=False, slots=True)
class _Layer:
    """The experts of one layer at work.

    Attributes:
        number: Of the layer.
        rows_ND: What they are given.
        out_ND: Where their rows go.
    """

    number: int
    rows_ND: Rows
    out_ND: Rows


class ExpertCalls:
    """Asks expert services.

    Args:
        mesh: The services.
        deadline: Of all these calls together.
        note: Is told who computed.
    """

    def __init__(self, mesh: Mesh, deadline: Deadline, note: Callable[[Origin], None]) -> None:
        self._mesh = mesh
        self._deadline = deadline
        self._note = note

    async def apply(self, call: ApplyExperts) -> Applied:
        """The rows of routed experts.

        Raises:
            Unavailable: No replica of an expert is left; names it.
            MeshError: It failed for another reason.
        """
        out_ND: Rows = np.empty(call.rows_ND.shape, np.float32)
        rows_ND = wire.narrow(call.rows_ND, self._mesh.wire_dtype) if self._mesh.narrows else call.rows_ND
        await self._apply_all(_Layer(call.layer, rows_ND, out_ND), call.slices())
        return Applied(out_ND)

    async def _apply_all(self, layer: _Layer, work: Work) -> None:
        """One message to each expert service that has rows, all at once; more where one would be too large."""
        service2work: dict[ReplicaSet, list[tuple[int, slice]]] = {}
        for expert, rows in work:
            service2work.setdefault(self._mesh.holder(layer.number, expert), []).append((expert, rows))
        await all_of(
            [
                self._apply_at(service, layer, message)
                for service, held in service2work.items()
                for message in messages(held, self._mesh.message_rows)
            ]
        )

    async def _apply_at(self, service: ReplicaSet, layer: _Layer, work: Work) -> None:
        experts = [expert for expert, _ in work]
        rows_ND = layer.rows_ND
        sent_ND = rows_ND[work[0][1]] if len(work) == 1 else np.concatenate([rows_ND[rows] for _, rows in work])
        digests = [self._mesh.expert_digest(layer.number, expert) for expert in experts]

        def read(reply: ApplyResponse, origin: Origin) -> Rows:
            if reply.layer != layer.number or list(reply.experts) != experts or list(reply.digests) != digests:
                raise CorruptReply("it is of another layer, expert or weight than was asked for")
            self._note(origin)
            return wire.widen(wire.decode_rows(reply.rows, sent_ND.shape, "rows"))

        request = ApplyRequest(
            layer=layer.number,
            experts=experts,
            counts=[rows.stop - rows.start for _, rows in work],
            rows=wire.encode(sent_ND),
        )
        try:
            given_ND = await service.call("Apply", request, self._deadline, read)
        except Unavailable as error:
            if service.live:
                raise expert_unavailable(error, layer.number, experts[0]) from None
            await self._apply_all(layer, work)  # by others that hold these experts, if there are any
            return
        start = 0
        for _, rows in work:
            stop = start + rows.stop - rows.start
            layer.out_ND[rows] = given_ND[start:stop]
            start = stop


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
