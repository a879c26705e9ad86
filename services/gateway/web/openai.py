"""The routes that clients of OpenAI know: `/v1/models`, `/v1/completions`, `/v1/chat/completions`; and `/tokenize`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from expertmesh.rpc import request_id as request_ids
from expertmesh.rpc.deadline import Deadline
from expertmesh.serving.inference import InferenceServicer
from expertmesh.serving.requests import DEFAULT_TIMEOUT_S
from expertmesh.v1.inference_pb2 import GenerateResponse, TokenizeRequest

from .body import parse_object, read
from .calls import Call, read_chat_completion, read_completion
from .endpoint import Endpoint, unless_left
from .errors import openai_error, openai_response
from .fields import Fields
from .prompts import read_chat
from .replies import Replies, TokenTexts
from .shapes import ChatShape, CompletionShape, Shape
from .sse import EventStream
from .streams import all_of, merged

MAX_BODY_BYTES = 8 * 2**20


@dataclass(frozen=True)
class ServedModel:
    """The one model that is served.

    Attributes:
        name: What clients call it; empty to take any name.
        created_s: When it was made, in seconds since 1970.
        context: Most tokens of a prompt and its answer together; 0 if that is not known.
    """

    name: str
    created_s: int
    context: int

    def card(self) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created_s,
            "owned_by": "expertmesh",
            "max_model_len": self.context,
        }


def openai_routes(inference: InferenceServicer, model: ServedModel, token_texts: TokenTexts | None) -> list[Route]:
    """All of them.

    Args:
        inference: Answers requests.
        model: What is served.
        token_texts: Gives the text of each of some token ids; without it logprobs are refused.
    """

    async def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [model.card()]})

    async def show_model(request: Request) -> Response:
        name = request.path_params["model"]
        return JSONResponse(model.card()) if name == model.name else _no_such_model(name)

    async def complete(request: Request) -> Response:
        fields = _fields(await read(request, MAX_BODY_BYTES), '{"prompt": "..."}')
        if refusal := _refusal(fields, model):
            return refusal
        return await _answer(request, read_completion(fields, model.context), CompletionShape())

    async def complete_chat(request: Request) -> Response:
        fields = _fields(await read(request, MAX_BODY_BYTES), '{"messages": [{"role": "user", "content": "..."}]}')
        if refusal := _refusal(fields, model):
            return refusal
        return await _answer(request, read_chat_completion(fields), ChatShape())

    async def tokenize(request: Request) -> Response:
        fields = _fields(await read(request, MAX_BODY_BYTES), '{"prompt": "..."}')
        if refusal := _refusal(fields, model):
            return refusal
        message = _read_tokenize(fields)
        reply = await unless_left(request, inference.tokenize(message, Deadline.after(DEFAULT_TIMEOUT_S)))
        return JSONResponse({"count": len(reply.ids), "max_model_len": model.context, "tokens": list(reply.ids)})

    async def _answer(request: Request, call: Call, shape: Shape) -> Response:
        replies = Replies(call, shape, request_ids.current_or_new(), model.name, token_texts)
        deadline = Deadline.after(call.timeout_s)
        if call.stream:
            return EventStream(replies.pieces(_messages(inference, call, deadline)), openai_error)

        async def whole() -> dict[str, Any]:
            responses = await all_of([inference.complete(one, deadline) for one in call.requests])
            return await replies.whole(responses)

        return JSONResponse(await unless_left(request, whole()))

    return [
        Endpoint("/v1/models", list_models, openai_error).route("GET"),
        Endpoint("/v1/models/{model:path}", show_model, openai_error).route("GET"),
        Endpoint("/v1/completions", complete, openai_error).route("POST"),
        Endpoint("/v1/chat/completions", complete_chat, openai_error).route("POST"),
        Endpoint("/tokenize", tokenize, openai_error).route("POST"),
    ]


def _messages(
    inference: InferenceServicer, call: Call, deadline: Deadline
) -> AsyncGenerator[tuple[int, GenerateResponse], None]:
    return merged([inference.generate(request, deadline) for request in call.requests])


def _fields(data: bytes, example: str) -> Fields:
    return Fields(parse_object(data, example))


def _refusal(fields: Fields, model: ServedModel) -> Response | None:
    """The reply to a request for another model; one that names none wants the one there is."""
    name = fields.string("model")
    return _no_such_model(name) if name is not None and model.name and name != model.name else None


def _no_such_model(name: str) -> Response:
    shown = ascii(name if len(name) <= 64 else name[:64] + "...")
    return openai_response(404, f"the model {shown} is not served here", "model", "model_not_found")


def _read_tokenize(fields: Fields) -> TokenizeRequest:
    prompt = fields.string("prompt")
    request = TokenizeRequest(chat=read_chat(fields)) if prompt is None else TokenizeRequest(text=prompt)
    fields.neutral("add_special_tokens", True)
    fields.neutral("add_generation_prompt", True)
    fields.end()
    return request
