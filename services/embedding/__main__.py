"""Starts the embedding: `python -m services.embedding --model DIR --listen ADDRESS`."""

from __future__ import annotations

from expertmesh.rpc.server import Program, Servicer, main_guard, run
from expertmesh.rpc.settings import ModelSettings, read_settings
from expertmesh.serving.stage import Stage
from expertmesh.telemetry.tracing import Tracing
from expertmesh.v1.embedding_pb2_grpc import add_EmbeddingServiceServicer_to_server

from .service import EmbeddingServicer


def load(settings: ModelSettings, tracing: Tracing) -> Program:
    """Loads the embedding and warms it up."""
    stage = Stage("embedding", settings)
    servicer = EmbeddingServicer(stage)
    registration = Servicer("expertmesh.v1.EmbeddingService", add_EmbeddingServiceServicer_to_server, servicer)
    return Program([registration], stage.description())


def main(arguments: list[str]) -> int:
    """Runs the program until it is stopped; gives its exit status."""
    return run(read_settings(ModelSettings, "embedding", arguments), "embedding", load)


if __name__ == "__main__":
    main_guard(main)
