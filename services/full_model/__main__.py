"""Starts the full model: `python -m services.full_model --model DIR --listen ADDRESS`."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

from expertmesh.checkpoint.tokenizer import load_tokenizer
from expertmesh.rpc.server import Program, Servicer, main_guard, run
from expertmesh.rpc.settings import CacheSettings, check, read_settings, setting
from expertmesh.serving.batcher import Limits
from expertmesh.serving.caching import make_leases
from expertmesh.serving.generator import Generator
from expertmesh.serving.inference import InferenceServicer
from expertmesh.serving.inspection import InspectionServicer
from expertmesh.serving.scheduler import StepLimits
from expertmesh.serving.stage import Stage
from expertmesh.serving.tokenizing import TokenizerServicer
from expertmesh.telemetry.tracing import Tracing
from expertmesh.v1.description_pb2 import Part

from .language import LocalHome, LocalTokenizing, LocalTokens
from .service import LocalClassifier


@dataclass(frozen=True)
class FullModelSettings(CacheSettings):
    """What the full model can be told."""

    inspect: bool = setting("offer InspectionService, which shows hidden states", False)
    pass_texts: int = setting("most texts that share a pass", 64)
    step_rows: int = setting("most token rows that share a step of generation", 256)
    step_sequences: int = setting("most sequences that generate at once", 128)
    waiting_texts: int = setting("most texts, or sequences to generate, that wait; more are refused", 8192)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.pass_texts >= 1, "pass_texts must be at least 1")
        check(self.waiting_texts >= 1, "waiting_texts must be at least 1")
        check(self.step_rows >= 1, "step_rows must be at least 1")
        check(self.step_sequences >= 1, "step_sequences must be at least 1")


def load(settings: FullModelSettings, tracing: Tracing) -> Program:
    """Loads every stage and warms them up."""
    stage = Stage("full_model", settings)
    registrations, lifespan = _language(stage, settings) if stage.spec.generates else _classifier(stage, settings)
    description = stage.description()
    parts = stage.loader.manifest.parts
    for name in stage.loader.manifest.tokenizer_parts():
        description.parts.append(Part(name=name, digest=parts[name].digest))
    return Program(registrations, description, lifespan)


def _classifier(stage: Stage, settings: FullModelSettings) -> tuple[list[Servicer], None]:
    classifier = LocalClassifier(stage, Limits(pass_texts=settings.pass_texts, waiting_texts=settings.waiting_texts))
    registrations = [InferenceServicer(stage.spec, classifier).registration()]
    if settings.inspect:
        registrations.append(InspectionServicer(classifier.inspect).registration())
    return registrations, None


def _language(stage: Stage, settings: FullModelSettings) -> tuple[list[Servicer], AbstractAsyncContextManager[None]]:
    leases = make_leases(stage, settings.kv_tokens, math.inf)
    limits = StepLimits(settings.step_rows, settings.step_sequences, settings.waiting_texts, micro_batches=1)
    tokens = LocalTokens(stage.spec.embedding.vocab, LocalHome(stage, leases), limits)
    tokenizer = TokenizerServicer(load_tokenizer(stage.loader.folder, stage.loader.manifest), stage.spec)
    generator = Generator(stage.spec, tokens, LocalTokenizing(tokenizer))
    registrations = [InferenceServicer(stage.spec, generator=generator).registration(), tokenizer.registration()]
    if settings.inspect:
        registrations.append(InspectionServicer(tokens.inspect).registration())

    @asynccontextmanager
    async def lifespan() -> AsyncIterator[None]:
        async with tokenizer:
            yield
        tokens.close()

    return registrations, lifespan()


def main(arguments: list[str]) -> int:
    """Runs the program until it is stopped; gives its exit status."""
    return run(read_settings(FullModelSettings, "full_model", arguments), "full_model", load)


if __name__ == "__main__":
    main_guard(main)
