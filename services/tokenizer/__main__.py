"""Starts the tokenizer: `python -m services.tokenizer --model DIR --listen ADDRESS`. It imports no torch."""

from __future__ import annotations

from expertmesh import __version__
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.checkpoint.tokenizer import load_tokenizer
from expertmesh.rpc.server import Program, main_guard, run
from expertmesh.rpc.settings import ModelSettings, read_settings
from expertmesh.serving.tokenizing import TokenizerServicer
from expertmesh.telemetry.tracing import Tracing
from expertmesh.tokenization.tokenizer import Tokenizer
from expertmesh.v1.description_pb2 import DescribeResponse, Part


def load(settings: ModelSettings, tracing: Tracing) -> Program:
    """Loads the tokenizer and warms it up."""
    manifest = Manifest.read(settings.model)
    tokenizer = load_tokenizer(settings.model, manifest)
    if isinstance(tokenizer, Tokenizer):
        tokenizer.encode(["warm-up"], manifest.spec.context)
    else:
        tokenizer.encode("warm-up")
    servicer = TokenizerServicer(tokenizer, manifest.spec)
    description = DescribeResponse(
        kind="tokenizer",
        parts=[Part(name=name, digest=manifest.parts[name].digest) for name in manifest.tokenizer_parts()],
        model_digest=manifest.digest,
        device="cpu",
        version=__version__,
    )
    return Program([servicer.registration()], description, lifespan=servicer)


def main(arguments: list[str]) -> int:
    """Runs the program until it is stopped; gives its exit status."""
    return run(read_settings(ModelSettings, "tokenizer", arguments), "tokenizer", load)


if __name__ == "__main__":
    main_guard(main)
