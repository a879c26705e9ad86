"""Text to ids and back as a `tokenizer.json` says, by the library that it was made with (`tokenizers`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tokenizers

from expertmesh.errors import BadCheckpoint
from expertmesh.tokenization.token_settings import TokenSettings, read_bytes


class JsonCodec:
    """A loaded `tokenizer.json`.

    Whether a text gets start and end tokens is said by that file's post-processor and by nothing else; neither
    truncation nor padding that it asks for is done.

    Args:
        path: The file.
        settings: What the files beside it say.

    Raises:
        BadCheckpoint: The file is missing or damaged.
    """

    def __init__(self, path: Path, settings: TokenSettings) -> None:
        self._backend = _load(path)
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.add_tokens([token for _, token in settings.added])
        named = [*settings.named.values(), *settings.special]
        self._backend.add_special_tokens([text for text in named if self._backend.token_to_id(text) is not None])
        self.vocab = 1 + max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1)
        self.special_texts = dict(settings.named)

    def encode(self, text: str, special: bool) -> list[int]:
        """Gives the ids of a text. Only the batched call lets other threads run meanwhile."""
        return list(self._backend.encode_batch_fast([text], add_special_tokens=special)[0].ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Gives the text of ids in [0, vocab), without special tokens."""
        return str(self._backend.decode_batch([ids], skip_special_tokens=True)[0])


def _load(path: Path) -> tokenizers.Tokenizer:
    content = read_bytes(path)
    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except BaseException as error:  # a panic of the library's Rust code is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise BadCheckpoint(f"{path}: is not a tokenizer.json that is understood") from None
