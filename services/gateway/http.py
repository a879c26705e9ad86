"""The gateway's HTTP side: the two inference routes, probes and metrics.

`POST /api/v1/infer` goes through the mesh, `POST /api/v2/infer` through the full model. Both take
`{"text": "..."}` and optionally `"contract": "exact" | "mesh-only" | "degraded-ok"` and `"timeout_s"`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import uvicorn
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from expertmesh.errors import InvalidInput, MeshError, Overloaded, SetupError, Unavailable
from expertmesh.rpc.deadline import MAX_TIMEOUT_S, Deadline
from expertmesh.rpc.errors import code_of
from expertmesh.rpc.settings import parse_host_port
from expertmesh.serving.inference import InferenceServicer, route_name
from expertmesh.serving.requests import DEFAULT_TIMEOUT_S, MAX_TEXT_BYTES
from expertmesh.telemetry import metrics, tracing
from expertmesh.telemetry.logging import event
from expertmesh.v1 import inference_pb2
from expertmesh.v1.inference_pb2 import ClassifyRequest, ClassifyResponse

MAX_BODY_BYTES = 8 * MAX_TEXT_BYTES  # JSON may write one byte of text as \u00XX
BODY_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 3
CLIENT_CLOSED_REQUEST = 499  # as nginx names it; nobody is there to read it
HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 412,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
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


def application(inference: InferenceServicer, is_ready: Callable[[], bool]) -> Starlette:
    """The HTTP application.

    Args:
        inference: Answers requests.
        is_ready: Whether some route can serve.
    """

    async def by_mesh(request: Request) -> Response:
        return await _infer(request, inference_pb2.ROUTE_MESH)

    async def by_full_model(request: Request) -> Response:
        return await _infer(request, inference_pb2.ROUTE_FULL_MODEL)

    async def _infer(request: Request, route: inference_pb2.Route) -> Response:
        body = _parse(await _read(request))
        message = ClassifyRequest(texts=[body.text], contract=body.contract, route=route)
        answer = inference.answer(message, Deadline.after(body.timeout_s))
        return JSONResponse(_reply(await _unless_left(request, answer)))

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        ready = is_ready()
        return PlainTextResponse("ready\n" if ready else "not ready\n", 200 if ready else 503)

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.exposition(), media_type=metrics.CONTENT_TYPE)

    return Starlette(
        routes=[
            Route("/api/v1/infer", _answered(by_mesh), methods=["POST"]),
            Route("/api/v2/infer", _answered(by_full_model), methods=["POST"]),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", show_metrics),
        ]
    )


def _answered(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    """Turns errors into statuses, and counts."""

    async def answered(request: Request) -> Response:
        started_s = time.monotonic()
        try:
            with tracing.http_span(f"{request.method} {request.url.path}", request.headers):
                response = await handler(request)
        except MeshError as error:
            response = _error(error)
        except ClientDisconnect:
            response = Response(status_code=CLIENT_CLOSED_REQUEST)
        except Exception:
            error_id = secrets.token_hex(8)
            event("internal_error", level=logging.ERROR, exc_info=True, method=request.url.path, error_id=error_id)
            response = JSONResponse({"error": {"status": "INTERNAL", "message": f"internal error {error_id}"}}, 500)
        metrics.RPCS.labels(request.url.path, str(response.status_code)).inc()
        metrics.RPC_SECONDS.labels(request.url.path).observe(time.monotonic() - started_s)
        return response

    return answered


def _error(error: MeshError) -> Response:
    code = code_of(error)
    content: dict[str, Any] = {"status": code.name, "message": str(error)}
    headers = {}
    match error:
        case InvalidInput(field=field) if field:
            content["field"] = field
        case Unavailable(stage=stage, layer=layer, expert=expert):
            content |= {"stage": stage, "layer": layer, "expert": expert}
            headers["Retry-After"] = "1"
        case Overloaded(retry_after_s=retry_after_s):
            headers["Retry-After"] = str(math.ceil(retry_after_s))
    return JSONResponse({"error": content}, HTTP_STATUS.get(code, 500), headers)


async def _read(request: Request) -> bytes:
    """The body, given up as soon as it is too large or too slow."""
    data = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for chunk in request.stream():
                data += chunk
                if len(data) > MAX_BODY_BYTES:
                    raise InvalidInput(f"the body has more than {MAX_BODY_BYTES} bytes")
    except TimeoutError:
        raise InvalidInput(f"the body did not arrive within {BODY_TIMEOUT_S:.0f} s") from None
    return bytes(data)


async def _unless_left(request: Request, answer: Coroutine[Any, Any, ClassifyResponse]) -> ClassifyResponse:
    """Waits for an answer; work for a caller that has gone is cancelled.

    Raises:
        ClientDisconnect: The caller has gone.
    """
    work = asyncio.create_task(answer)
    left = asyncio.ensure_future(request.receive())
    waits: list[asyncio.Future[Any]] = [work, left]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return await work
        raise ClientDisconnect
    finally:
        for task in (work, left):
            task.cancel()
        await asyncio.gather(work, left, return_exceptions=True)


def _parse(data: bytes) -> _Body:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise InvalidInput('the body is no JSON in UTF-8; send {"text": "..."}') from None
    if not isinstance(values, dict) or not isinstance(values.get("text"), str):
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
        "request_id": response.request_id,
        "timings_s": {timing.stage: round(timing.seconds, 6) for timing in response.timings},
    }


class _Server(uvicorn.Server):
    """A uvicorn that leaves signals to the program it runs in."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def serve(app: Starlette, address: str) -> AsyncIterator[str]:
    """Serves an application while the context is open; gives the address it got.

    Raises:
        SetupError: The port is in use.
    """
    host, port = parse_host_port(address, "http")
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=STOP_TIMEOUT_S,
    )
    server = _Server(config)
    try:
        listener = config.bind_socket()
    except SystemExit:
        raise SetupError(f"cannot listen on {address} for HTTP: it is in use; choose another with --http") from None
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"{host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        listener.close()
