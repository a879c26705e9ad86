"""A bare echo over gRPC streams, as a floor for what a hop costs: `python -m benchmarks.echo ADDRESS` is one server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from benchmarks.child import ROOT

_METHOD = "/benchmarks.Echo/Stream"
_OPTIONS = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))


class _Handler(grpc.GenericRpcHandler):
    def service(self, details: grpc.HandlerCallDetails) -> Any:
        return grpc.stream_stream_rpc_method_handler(_echo)


async def _echo(requests: Any, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
    while (message := await context.read()) is not grpc.aio.EOF:
        await context.write(message)


class Echo:
    """Streams to echo servers.

    Args:
        calls: One stream to each.
    """

    def __init__(self, calls: Sequence[Any]) -> None:
        self._calls = calls

    async def fan_out(self, messages: Sequence[bytes]) -> None:
        """Sends one message to each of the first servers, all at once, and waits for all the same back."""
        await asyncio.gather(*(self._ask(call, message) for call, message in zip(self._calls, messages, strict=False)))

    async def _ask(self, call: Any, message: bytes) -> None:
        await call.write(message)
        reply = await call.read()
        assert len(reply) == len(message)


@asynccontextmanager
async def echoes(servers: int, folder: Path) -> Any:
    """So many echo servers, each a process at a unix socket of its own in `folder`, and a stream to each."""
    addresses = [f"unix:{folder / f'echo-{number}.sock'}" for number in range(servers)]
    async with AsyncExitStack() as stack:
        calls = []
        for address in addresses:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", __name__, address, stdin=asyncio.subprocess.PIPE, cwd=ROOT
            )
            stack.push_async_callback(_end, process)
        for address in addresses:
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address, options=_OPTIONS))
            call = channel.stream_stream(_METHOD)(wait_for_ready=True)
            stack.callback(call.cancel)
            calls.append(call)
        yield Echo(calls)


async def _end(process: asyncio.subprocess.Process) -> None:
    assert process.stdin is not None
    process.stdin.close()
    await process.wait()


async def _serve(address: str) -> None:
    server = grpc.aio.server(options=_OPTIONS)
    server.add_generic_rpc_handlers((_Handler(),))
    server.add_insecure_port(address)
    await server.start()
    await asyncio.to_thread(sys.stdin.read)  # until the benchmark ends, however it does
    await server.stop(None)


if __name__ == "__main__":
    asyncio.run(_serve(sys.argv[1]))
