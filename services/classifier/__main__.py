"""Starts the classifier: `python -m services.classifier --model DIR --listen ADDRESS`."""

from __future__ import annotations

from expertmesh.rpc.server import Program, Servicer, main_guard, run
from expertmesh.rpc.settings import ModelSettings, read_settings
from expertmesh.serving.stage import Stage
from expertmesh.telemetry.tracing import Tracing
from expertmesh.v1.classifier_pb2_grpc import add_ClassifierServiceServicer_to_server

from .service import ClassifierServicer


def load(settings: ModelSettings, tracing: Tracing) -> Program:
    """Loads the head and warms it up."""
    stage = Stage("classifier", settings)
    servicer = ClassifierServicer(stage)
    registration = Servicer("expertmesh.v1.ClassifierService", add_ClassifierServiceServicer_to_server, servicer)
    return Program([registration], stage.description())


def main(arguments: list[str]) -> int:
    """Runs the program until it is stopped; gives its exit status."""
    return run(read_settings(ModelSettings, "classifier", arguments), "classifier", load)


if __name__ == "__main__":
    main_guard(main)
