"""The tokenizer of a split model, its digests checked. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from expertmesh.checkpoint.manifest import Manifest, read_checked
from expertmesh.errors import BadCheckpoint
from expertmesh.tokenization.language import LanguageTokenizer
from expertmesh.tokenization.tokenizer import NORMALIZER_FILE, Tokenizer


def load_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer | LanguageTokenizer:
    """Loads the tokenizer: a classifier's has a normaliser, a language model's has none.

    Raises:
        BadCheckpoint: A file of it is missing or damaged, or it has more ids than the embedding has rows.
    """
    for name in manifest.tokenizer_parts():
        read_checked(folder, name, manifest.parts[name])
    is_classifier = f"tokenizer/{NORMALIZER_FILE}" in manifest.parts
    kind = Tokenizer if is_classifier else LanguageTokenizer
    tokenizer = kind.load(folder / "tokenizer")
    if tokenizer.vocab > manifest.spec.embedding.vocab:
        raise BadCheckpoint(
            f"the tokenizer has {tokenizer.vocab} ids, the embedding only {manifest.spec.embedding.vocab} rows"
        )
    return tokenizer


def load_classifier_tokenizer(folder: Path, manifest: Manifest) -> Tokenizer:
    """Loads the tokenizer of a classifier.

    Raises:
        BadCheckpoint: As `load_tokenizer`, or it is a language model's.
    """
    tokenizer = load_tokenizer(folder, manifest)
    if not isinstance(tokenizer, Tokenizer):
        raise BadCheckpoint(f"{folder} holds the tokenizer of a language model, not of a classifier")
    return tokenizer
