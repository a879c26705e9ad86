"""The gateway's HTTP side: its routes put together, probes, metrics, and how it is served."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from expertmesh.errors import SetupError
from expertmesh.rpc.settings import parse_host_port
from expertmesh.serving.inference import InferenceServicer
from expertmesh.telemetry import metrics

from .errors import no_such_route
from .infer import infer_routes
from .openai import ServedModel, openai_routes
from .replies import TokenTexts

STOP_TIMEOUT_S = 3


def application(
    inference: InferenceServicer,
    is_ready: Callable[[], bool],
    model_name: str = "",
    created_s: int = 0,
    context: int = 0,
    token_texts: TokenTexts | None = None,
) -> Starlette:
    """The HTTP application.

    Args:
        inference: Answers requests.
        is_ready: Whether some route can serve.
        model_name: What clients call the model; empty to take any name.
        created_s: When the model was made, in seconds since 1970.
        context: Most tokens of a prompt and its answer together; 0 if that is not known.
        token_texts: Gives the text of each of some token ids; without it logprobs are refused.
    """

    async def healthz(request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(request: Request) -> Response:
        ready = is_ready()
        return PlainTextResponse("ready\n" if ready else "not ready\n", 200 if ready else 503)

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.exposition(), media_type=metrics.CONTENT_TYPE)

    return Starlette(
        routes=[
            *infer_routes(inference),
            *openai_routes(inference, ServedModel(model_name, created_s, context), token_texts),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/metrics", show_metrics),
        ],
        exception_handlers={HTTPException: no_such_route},
    )


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
    listener.listen(config.backlog)  # at once, so that nobody who is told the address is refused
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"{host}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await task
        await asyncio.gather(*server.server_state.tasks, return_exceptions=True)  # cancelled, but not waited for
        listener.close()
