"""An inference servicer that plays a script, and remembers what it was asked and whether its streams were closed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from expertmesh.errors import MeshError
from expertmesh.rpc.deadline import Deadline
from expertmesh.rpc.errors import DETAILS_KEY, code_of, details_of
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.inference_pb2_grpc import InferenceServiceServicer, add_InferenceServiceServicer_to_server
from expertmesh.v1.sampling_pb2 import TokenLogprob, TokenLogprobs

PROFILE = "cpu-fp32 avx2 0123456789abcdef"
Step = pb.GenerateResponse | MeshError | asyncio.Event | Callable[[], Any]


def said(text: str = "", choice: int = 0, ids: Sequence[int] = (), finish: int = 0, **more: Any) -> pb.GenerateResponse:
    """A message; its tokens have logprobs of -id/10 and are followed in likelihood by the next id."""
    tokens = [
        TokenLogprobs(
            id=one,
            logprob=-one / 10,
            top=[TokenLogprob(id=one, logprob=-one / 10), TokenLogprob(id=one + 1, logprob=-one / 10 - 1)],
        )
        for one in ids
    ]
    given: dict[str, Any] = {"route": pb.ROUTE_MESH, "exact": True, "profile": PROFILE, "seed": 7} | more
    return pb.GenerateResponse(choice=choice, text=text, tokens=tokens, finish_reason=finish, **given)  # type: ignore[arg-type]


HELLO = (
    said("Hel", ids=[1]),
    said("lo", ids=[2, 3]),
    said("!", ids=[4], finish=pb.FINISH_REASON_STOP, usage=pb.Usage(prompt_tokens=5, completion_tokens=4)),
)


class Scripted(InferenceServiceServicer):
    """Plays the same steps for every call: a message is sent, an error raised, an event waited for.

    Args:
        steps: The script. A function is called.
    """

    def __init__(self, *steps: Step) -> None:
        self.steps = steps or HELLO
        self.requests: list[pb.GenerateRequest] = []
        self.tokenized: list[pb.TokenizeRequest] = []
        self.timeouts_s: list[float] = []
        self.sent = 0
        self.started = asyncio.Event()
        self.closed = asyncio.Event()
        self.open = 0

    async def generate(self, request: pb.GenerateRequest, deadline: Deadline) -> AsyncIterator[pb.GenerateResponse]:
        self.requests.append(request)
        self.timeouts_s.append(deadline.remaining_s())
        self.open += 1
        self.started.set()
        try:
            for step in self.steps:
                if isinstance(step, pb.GenerateResponse):
                    yield step
                    self.sent += 1
                elif isinstance(step, MeshError):
                    raise step
                elif isinstance(step, asyncio.Event):
                    await step.wait()
                else:
                    step()
        finally:
            self.open -= 1
            self.closed.set()

    async def complete(self, request: pb.GenerateRequest, deadline: Deadline) -> pb.CompleteResponse:
        choices = [pb.Completion() for _ in range(request.n or 1)]
        usage, seed = pb.Usage(), 0
        async for message in self.generate(request, deadline):
            choice = choices[message.choice]
            choice.text += message.text
            choice.tokens.extend(message.tokens)
            choice.finish_reason = message.finish_reason
            choice.route, choice.exact, choice.profile = message.route, message.exact, message.profile
            choice.missing_experts.extend(message.missing_experts)
            seed = message.seed
            usage.MergeFrom(message.usage)
        return pb.CompleteResponse(choices=choices, usage=usage, seed=seed)

    async def tokenize(self, request: pb.TokenizeRequest, deadline: Deadline) -> pb.TokenizeResponse:
        self.tokenized.append(request)
        return pb.TokenizeResponse(ids=[1, 5, 9])

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        try:
            async for message in self.generate(request, Deadline.of_call(context, 30)):
                yield message
        except MeshError as error:
            await context.abort(code_of(error), str(error), ((DETAILS_KEY, details_of(error)),))

    async def Complete(self, request: pb.CompleteRequest, context: Any) -> pb.CompleteResponse:
        return await self.complete(request.request, Deadline.of_call(context, 30))

    async def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        return await self.tokenize(request, Deadline.of_call(context, 30))

    @asynccontextmanager
    async def served(self) -> AsyncIterator[str]:
        """Serves it over gRPC, without the product's interceptor."""
        server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        add_InferenceServiceServicer_to_server(self, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            await server.stop(None)
