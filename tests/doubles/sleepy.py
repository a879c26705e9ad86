"""An embedding in a process of its own; the first id of a request says for how many ms it blocks its event loop.

Run as `python -m tests.doubles.sleepy ADDRESS`; it is served as every program of the mesh is, links included.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from expertmesh import wire
from expertmesh.rpc.server import Program, Servicer, run
from expertmesh.rpc.settings import Settings
from expertmesh.v1 import embedding_pb2
from expertmesh.v1.description_pb2 import DescribeResponse, Part
from expertmesh.v1.embedding_pb2 import EmbedResponse
from expertmesh.v1.embedding_pb2_grpc import EmbeddingServiceServicer, add_EmbeddingServiceServicer_to_server

DIGEST = bytes(range(32))  # that of `Honest`, whose module would import torch


class Sleepy(EmbeddingServiceServicer):
    async def Embed(self, request: Any, context: Any) -> EmbedResponse:
        (milliseconds,) = wire.decode(request.ids, wire.INT32, (1,), "ids")
        time.sleep(milliseconds / 1000)  # noqa: ASYNC251 (the loop is to be blocked)
        return EmbedResponse(rows=wire.encode(np.full((1, 2), os.getpid(), np.float32)))


@contextmanager
def running(*addresses: str) -> Iterator[list[int]]:
    """Runs one at each address until the context is left; gives their process ids."""
    command = [sys.executable, "-m", "tests.doubles.sleepy"]
    with ExitStack() as stack:
        processes = []
        for address in addresses:
            process = stack.enter_context(subprocess.Popen([*command, address], stderr=subprocess.PIPE))
            stack.callback(process.kill)
            processes.append(process)
        for process in processes:
            assert process.stderr is not None
            while b'"ready"' not in (line := process.stderr.readline()):
                assert line, "it ended before it was ready"
        yield [process.pid for process in processes]


if __name__ == "__main__":
    name = embedding_pb2.DESCRIPTOR.services_by_name["EmbeddingService"].full_name
    program = Program(
        [Servicer(name, add_EmbeddingServiceServicer_to_server, Sleepy())],
        DescribeResponse(kind="embedding", parts=[Part(name="embedding", digest=DIGEST)]),
    )
    sys.exit(run(Settings(listen=sys.argv[1]), "embedding", lambda settings, tracing: program))
