"""Errors as HTTP tells them: in a shape of our own for our own routes, in OpenAI's for the routes of its clients."""

from __future__ import annotations

import math
from typing import Any

import grpc
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from expertmesh.errors import InvalidInput, MeshError, Overloaded, Unavailable, WrongPart
from expertmesh.rpc.errors import code_of

OPENAI_PATHS = ("/v1/", "/tokenize")
HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 412,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
_TYPES = {400: "invalid_request_error", 404: "invalid_request_error", 405: "invalid_request_error"}
# The contract's names of what a client of OpenAI calls otherwise.
_PARAMS = {
    "text": "prompt",
    "ids": "prompt",
    "chat": "messages",
    "stop_ids": "stop_token_ids",
    "ignore_end": "ignore_eos",
}


def api_error(error: MeshError | str) -> Response:
    """An error on a route of our own; one that is only a text is ours, and the text names it."""
    if isinstance(error, str):
        return JSONResponse({"error": {"status": "INTERNAL", "message": error}}, 500)
    code = code_of(error)
    content: dict[str, Any] = {"status": code.name, "message": str(error)}
    match error:
        case InvalidInput(field=field) if field:
            content["field"] = field
        case Unavailable(stage=stage, layer=layer, expert=expert):
            content |= {"stage": stage, "layer": layer, "expert": expert}
    return JSONResponse({"error": content}, HTTP_STATUS.get(code, 500), _retry_headers(error))


def openai_error(error: MeshError | str) -> Response:
    """An error as clients of OpenAI understand it."""
    if isinstance(error, str):
        return openai_response(500, error, code="internal")
    code = code_of(error)
    status, name, param = HTTP_STATUS.get(code, 500), code.name.lower(), ""
    if isinstance(error, InvalidInput):
        name, param = "", openai_param(error.field)
    elif isinstance(error, WrongPart):  # what the model is not made for, the request must not ask
        status, name = 400, "unsupported_by_model"
    return openai_response(status, str(error), param, name, _retry_headers(error))


def openai_response(
    status: int, message: str, param: str = "", code: str = "", headers: dict[str, str] | None = None
) -> Response:
    """A reply with an error in OpenAI's shape."""
    kind = "rate_limit_error" if status == 429 else _TYPES.get(status, "server_error")
    content = {"message": message, "type": kind, "param": param or None, "code": code or None}
    return JSONResponse({"error": content}, status, headers)


def openai_param(field: str) -> str:
    """A field of the contract by the name that it has in OpenAI's requests: `ids[3]` is `prompt[3]`."""
    if field.startswith("chat.messages"):
        return field.removeprefix("chat.")
    name = field.split("[")[0].split(".")[0]
    return _PARAMS.get(name, name) + field.removeprefix(name)


async def no_such_route(request: Request, error: Exception) -> Response:
    """The reply for a path or a method that is not there."""
    assert isinstance(error, HTTPException)
    if request.url.path.startswith(OPENAI_PATHS):
        return openai_response(error.status_code, f"{error.detail}: there is no such route", code="no_such_route")
    return PlainTextResponse(error.detail, error.status_code, error.headers)


def _retry_headers(error: MeshError) -> dict[str, str]:
    match error:
        case Unavailable():
            return {"Retry-After": "1"}
        case Overloaded(retry_after_s=retry_after_s):
            return {"Retry-After": str(math.ceil(retry_after_s))}
    return {}
