"""The tokenizer of a split model, its digests checked. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from expertmesh.checkpoint.manifest import Manifest, read_checked
from expertmesh.errors import BadCheckpoint
from expertmesh.tokenization.tokenizer import Tokenizer


def load_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """Loads the tokenizer.

    Raises:
        BadCheckpoint: A file of it is missing or damaged, or it has more ids than the embedding has rows.
    """
    for name in manifest.tokenizer_parts():
        read_checked(folder, name, manifest.parts[name])
    tokenizer = Tokenizer.load(folder / "tokenizer")
    if tokenizer.vocab > manifest.spec.embedding.vocab:
        raise BadCheckpoint(
            f"the tokenizer has {tokenizer.vocab} ids, the embedding only {manifest.spec.embedding.vocab} rows"
        )
    return tokenizer
