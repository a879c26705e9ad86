"""Starts the classifier: `python -m services.classifier --model DIR --listen ADDRESS`."""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.rpc.server import Program, Servicer, main_guard, run
from expertmesh.rpc.settings import ModelSettings, read_settings, setting
from expertmesh.serving.stage import Stage
from expertmesh.telemetry.tracing import Tracing
from expertmesh.v1.classifier_pb2_grpc import ClassifierServiceServicer, add_ClassifierServiceServicer_to_server

from .language import LanguageHeadServicer
from .service import ClassifierServicer


@dataclass(frozen=True)
class ClassifierSettings(ModelSettings):
    """What the classifier can be told."""

    inspect: bool = setting("let a language model's logits be asked for", False)


def load(settings: ClassifierSettings, tracing: Tracing) -> Program:
    """Loads the head and warms it up."""
    stage = Stage("classifier", settings)
    servicer: ClassifierServiceServicer
    if stage.spec.generates:
        servicer = LanguageHeadServicer(stage, settings.inspect, settings.max_message_bytes)
    else:
        servicer = ClassifierServicer(stage)
    registration = Servicer("expertmesh.v1.ClassifierService", add_ClassifierServiceServicer_to_server, servicer)
    return Program([registration], stage.description())


def main(arguments: list[str]) -> int:
    """Runs the program until it is stopped; gives its exit status."""
    return run(read_settings(ClassifierSettings, "classifier", arguments), "classifier", load)


if __name__ == "__main__":
    main_guard(main)
