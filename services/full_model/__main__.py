"""Starts the full model: `python -m services.full_model --model DIR --listen ADDRESS`."""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.rpc.server import Program, main_guard, run
from expertmesh.rpc.settings import ModelSettings, check, read_settings, setting
from expertmesh.serving.batcher import Limits
from expertmesh.serving.inference import InferenceServicer
from expertmesh.serving.inspection import InspectionServicer
from expertmesh.serving.stage import Stage
from expertmesh.telemetry.tracing import Tracing
from expertmesh.v1.description_pb2 import Part

from .service import LocalClassifier


@dataclass(frozen=True)
class FullModelSettings(ModelSettings):
    """What the full model can be told."""

    inspect: bool = setting("offer InspectionService, which shows hidden states", False)
    pass_texts: int = setting("most texts that share a pass", 64)
    waiting_texts: int = setting("most texts that wait; more are refused", 8192)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.pass_texts >= 1, "pass_texts must be at least 1")
        check(self.waiting_texts >= 1, "waiting_texts must be at least 1")


def load(settings: FullModelSettings, tracing: Tracing) -> Program:
    """Loads every stage and warms them up."""
    stage = Stage("full_model", settings)
    classifier = LocalClassifier(stage, Limits(pass_texts=settings.pass_texts, waiting_texts=settings.waiting_texts))
    registrations = [InferenceServicer(stage.spec, classifier).registration()]
    if settings.inspect:
        registrations.append(InspectionServicer(classifier.inspect).registration())
    description = stage.description()
    parts = stage.loader.manifest.parts
    for name in stage.loader.manifest.tokenizer_parts():
        description.parts.append(Part(name=name, digest=parts[name].digest))
    return Program(registrations, description)


def main(arguments: list[str]) -> int:
    """Runs the program until it is stopped; gives its exit status."""
    return run(read_settings(FullModelSettings, "full_model", arguments), "full_model", load)


if __name__ == "__main__":
    main_guard(main)
