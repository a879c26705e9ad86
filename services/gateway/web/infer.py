"""The two inference routes: one text in, its class out.

`POST /api/v1/infer` goes through the mesh, `POST /api/v2/infer` through the full model. Both take
`{"text": "..."}` and optionally `"contract": "exact" | "mesh-only" | "degraded-ok"` and `"timeout_s"`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from expertmesh.errors import InvalidInput
from expertmesh.rpc.deadline import MAX_TIMEOUT_S, Deadline
from expertmesh.serving.inference import InferenceServicer, route_name, told_missing
from expertmesh.serving.requests import DEFAULT_TIMEOUT_S, MAX_TEXT_BYTES
from expertmesh.v1 import inference_pb2
from expertmesh.v1.inference_pb2 import ClassifyRequest, ClassifyResponse

from .body import parse_object, read
from .endpoint import Endpoint, unless_left
from .errors import api_error

MAX_BODY_BYTES = 8 * MAX_TEXT_BYTES  # JSON may write one byte of text as \u00XX
CONTRACTS = {
    "exact": inference_pb2.CONTRACT_EXACT,
    "mesh-only": inference_pb2.CONTRACT_MESH_ONLY,
    "degraded-ok": inference_pb2.CONTRACT_DEGRADED_OK,
}


@dataclass(frozen=True)
class _Body:
    text: str
    contract: inference_pb2.Contract
    timeout_s: float


def infer_routes(inference: InferenceServicer) -> list[Route]:
    """Both routes, answered by one servicer."""

    async def by_mesh(request: Request) -> Response:
        return await _infer(request, inference_pb2.ROUTE_MESH)

    async def by_full_model(request: Request) -> Response:
        return await _infer(request, inference_pb2.ROUTE_FULL_MODEL)

    async def _infer(request: Request, route: inference_pb2.Route) -> Response:
        body = _parse(await read(request, MAX_BODY_BYTES))
        message = ClassifyRequest(texts=[body.text], contract=body.contract, route=route)
        answer = inference.answer(message, Deadline.after(body.timeout_s))
        return JSONResponse(_reply(await unless_left(request, answer)))

    return [
        Endpoint("/api/v1/infer", by_mesh, api_error).route("POST"),
        Endpoint("/api/v2/infer", by_full_model, api_error).route("POST"),
    ]


def _parse(data: bytes) -> _Body:
    values = parse_object(data, '{"text": "..."}')
    if not isinstance(values.get("text"), str):
        raise InvalidInput('the body must be {"text": "..."}', "text")
    unknown = sorted(set(values) - {"text", "contract", "timeout_s"})
    if unknown:
        raise InvalidInput(f"unknown keys: {ascii(unknown)[:100]}; known: text, contract, timeout_s")
    try:
        values["text"].encode()
    except UnicodeEncodeError:
        raise InvalidInput("text holds half a surrogate pair, which is no character", "text") from None
    contract = values.get("contract", "exact")
    if not isinstance(contract, str) or contract not in CONTRACTS:
        raise InvalidInput(f"contract must be one of {', '.join(CONTRACTS)}", "contract")
    timeout_s = values.get("timeout_s", DEFAULT_TIMEOUT_S)
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float) or not 0 < timeout_s <= MAX_TIMEOUT_S:
        raise InvalidInput(f"timeout_s must be a number of seconds in (0, {MAX_TIMEOUT_S:.0f}]", "timeout_s")
    return _Body(values["text"], CONTRACTS[contract], float(timeout_s))


def _reply(response: ClassifyResponse) -> dict[str, Any]:
    result = response.results[0]
    return {
        "predicted_category": result.label,
        "confidence": max(result.probabilities),
        "probabilities": dict(zip(response.labels, result.probabilities, strict=True)),
        "logits": dict(zip(response.labels, result.logits, strict=True)),
        "route": route_name(result.route),
        "exact": result.exact,
        "profile": result.profile,
        "tokens": result.tokens,
        "truncated": result.truncated,
        **told_missing((one.layer, one.expert) for one in result.missing_experts),
        "request_id": response.request_id,
        "timings_s": {timing.stage: round(timing.seconds, 6) for timing in response.timings},
    }
