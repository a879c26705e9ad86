"""Starts gating: `python -m services.gating --model DIR --listen ADDRESS`."""

from __future__ import annotations

from expertmesh.rpc.server import Program, Servicer, main_guard, run
from expertmesh.rpc.settings import ModelSettings, read_settings
from expertmesh.serving.stage import Stage
from expertmesh.telemetry.tracing import Tracing
from expertmesh.v1.gating_pb2_grpc import add_GatingServiceServicer_to_server

from .service import GatingServicer


def load(settings: ModelSettings, tracing: Tracing) -> Program:
    """Loads the gating of every layer and warms it up."""
    stage = Stage("gating", settings)
    servicer = GatingServicer(stage)
    registration = Servicer("expertmesh.v1.GatingService", add_GatingServiceServicer_to_server, servicer)
    return Program([registration], stage.description())


def main(arguments: list[str]) -> int:
    """Runs the program until it is stopped; gives its exit status."""
    return run(read_settings(ModelSettings, "gating", arguments), "gating", load)


if __name__ == "__main__":
    main_guard(main)
