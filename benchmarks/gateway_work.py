"""What the gateway itself does with the rows of a pass, done again in this process: no sockets, no event loop.

The shapes are those of a pass; values and routes are random.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.rounds import median_ms_of
from expertmesh import wire
from expertmesh.dispatch import ApplyExperts, combine, plan_dispatch
from expertmesh.model.spec import ModelSpec
from expertmesh.v1.expert_pb2 import ApplyRequest, ApplyResponse
from expertmesh.v1.gating_pb2 import GateRequest, GateResponse

SECONDS = 0.1  # of each kind of work
DIGEST = bytes(32)


def measure(spec: ModelSpec, rows: int, texts: int, services: int) -> dict[str, float]:
    """Median microseconds of each kind of work for one layer, with all messages of it.

    Args:
        spec: The model's; its experts are spread over the services evenly.
        rows: Token rows of a pass.
        texts: Texts of a pass.
        services: Expert services.
    """
    random = np.random.default_rng(1)
    width, top_k, experts = spec.width, spec.router.top_k, spec.router.experts
    x_TD = random.standard_normal((rows, width), np.float32)
    weights_TK = random.random((rows, top_k), np.float32)
    ids_TK = np.sort(random.permuted(np.tile(np.arange(experts, dtype=np.int32), (rows, 1)), axis=1)[:, :top_k], axis=1)
    lengths_B = np.full(texts, rows // texts, np.int32)
    plan = plan_dispatch(ids_TK, experts)
    rows_ND = x_TD[plan.row2token]
    held: dict[int, list[tuple[int, slice]]] = {}
    for expert, part in ApplyExperts(0, rows_ND, plan.counts_E).slices():
        held.setdefault(expert * services // experts, []).append((expert, part))
    messages = list(held.values())
    sent = [np.concatenate([rows_ND[part] for _, part in message]) for message in messages]
    gate_reply = GateResponse(
        residual=wire.encode(x_TD),
        expert_input=wire.encode(x_TD),
        expert_ids=wire.encode(ids_TK),
        weights=wire.encode(weights_TK),
    ).SerializeToString()
    apply_replies = [
        ApplyResponse(experts=[expert for expert, _ in message], digests=[DIGEST] * len(message), rows=wire.encode(own))
        for message, own in zip(messages, sent, strict=True)
    ]
    apply_bytes = [reply.SerializeToString() for reply in apply_replies]
    out_ND = np.empty_like(rows_ND)

    def serialise_gate() -> None:
        GateRequest(rows=wire.encode(x_TD), lengths=wire.encode(lengths_B)).SerializeToString()

    def serialise_experts() -> None:
        for message, own in zip(messages, sent, strict=True):
            counts = [part.stop - part.start for _, part in message]
            ids = [expert for expert, _ in message]
            ApplyRequest(experts=ids, counts=counts, rows=wire.encode(own)).SerializeToString()

    def parse_gate() -> None:
        reply = GateResponse.FromString(gate_reply)
        wire.decode_finite(reply.residual, (rows, width), "residual")
        wire.decode_rows(reply.expert_input, (rows, width), "expert_input")
        wire.decode(reply.expert_ids, wire.INT32, (rows, top_k), "expert_ids")
        wire.decode_finite(reply.weights, (rows, top_k), "weights")

    def parse_experts() -> None:
        for message, own, data in zip(messages, sent, apply_bytes, strict=True):
            given_ND = wire.widen(wire.decode_rows(ApplyResponse.FromString(data).rows, own.shape, "rows"))
            start = 0
            for _, part in message:
                stop = start + part.stop - part.start
                out_ND[part] = given_ND[start:stop]
                start = stop

    def copy() -> None:
        dispatched_ND = x_TD[plan.row2token]
        for message in messages:
            if len(message) > 1:  # one expert's rows are sent as they are
                np.concatenate([dispatched_ND[part] for _, part in message])

    kinds: dict[str, Callable[[], object]] = {
        "serialise: gating": serialise_gate,
        "parse: gating": parse_gate,
        "plan": lambda: plan_dispatch(ids_TK, experts),
        "copy": copy,
        "serialise: experts": serialise_experts,
        "parse: experts": parse_experts,
        "combine": lambda: combine(x_TD, rows_ND, weights_TK, plan),
    }
    return {name: median_ms_of(work, SECONDS) * 1e3 for name, work in kinds.items()}
