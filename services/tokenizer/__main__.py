"""Starts the tokenizer: `python -m services.tokenizer --model DIR --listen ADDRESS`. It imports no torch."""

from __future__ import annotations

from expertmesh import __version__
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.checkpoint.tokenizer import load_tokenizer
from expertmesh.rpc.server import Program, Servicer, main_guard, run
from expertmesh.rpc.settings import ModelSettings, read_settings
from expertmesh.telemetry.tracing import Tracing
from expertmesh.v1.description_pb2 import DescribeResponse, Part
from expertmesh.v1.tokenizer_pb2_grpc import add_TokenizerServiceServicer_to_server

from .service import TokenizerServicer


def load(settings: ModelSettings, tracing: Tracing) -> Program:
    """Loads the tokenizer and warms it up."""
    manifest = Manifest.read(settings.model)
    tokenizer = load_tokenizer(settings.model, manifest)
    tokenizer.encode(["warm-up"], manifest.spec.context)
    servicer = TokenizerServicer(tokenizer, manifest.spec.context)
    description = DescribeResponse(
        kind="tokenizer",
        parts=[Part(name=name, digest=manifest.parts[name].digest) for name in manifest.tokenizer_parts()],
        model_digest=manifest.digest,
        device="cpu",
        version=__version__,
    )
    registration = Servicer("expertmesh.v1.TokenizerService", add_TokenizerServiceServicer_to_server, servicer)
    return Program([registration], description)


def main(arguments: list[str]) -> int:
    """Runs the program until it is stopped; gives its exit status."""
    return run(read_settings(ModelSettings, "tokenizer", arguments), "tokenizer", load)


if __name__ == "__main__":
    main_guard(main)
