"""The tokenizer of a language model, from the files of its Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from expertmesh.errors import BadCheckpoint
from expertmesh.tokenization.json_codec import JsonCodec
from expertmesh.tokenization.piece_codec import PieceCodec
from expertmesh.tokenization.token_settings import TokenSettings

JSON_FILE = "tokenizer.json"
PIECES_FILE = "tokenizer.model"


class Codec(Protocol):
    """What both kinds of vocabulary files can do; safe to use from several threads at once."""

    vocab: int
    special_texts: dict[str, str]

    def encode(self, text: str, special: bool) -> list[int]:
        """Gives the ids of a text."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Gives the text of ids in [0, vocab)."""
        ...


class LanguageTokenizer:
    """Text to token ids and back, as the library that the checkpoint was made with does it.

    Args:
        codec: A loaded vocabulary.
        chat_template: Source of the chat template, if there is one.
    """

    def __init__(self, codec: Codec, chat_template: str | None = None) -> None:
        self._codec = codec
        self.chat_template = chat_template

    @classmethod
    def load(cls, folder: Path) -> LanguageTokenizer:
        """Reads `tokenizer.json`, or else `tokenizer.model`, and the smaller files beside it.

        Raises:
            BadCheckpoint: Both are missing, or a file is damaged.
        """
        folder = Path(folder)
        settings = TokenSettings.load(folder)
        codec: Codec
        if (folder / JSON_FILE).exists():
            codec = JsonCodec(folder / JSON_FILE, settings)
        elif (folder / PIECES_FILE).exists():
            codec = PieceCodec(folder / PIECES_FILE, settings)
        else:
            raise BadCheckpoint(f"{folder} holds neither {JSON_FILE} nor {PIECES_FILE}")
        return cls(codec, settings.chat_template)

    @property
    def vocab(self) -> int:
        """Number of ids V, added tokens included; every id is in [0, V)."""
        return self._codec.vocab

    @property
    def has_chat_template(self) -> bool:
        """Whether the model knows how to put messages into a text."""
        return self.chat_template is not None

    @property
    def special_texts(self) -> Mapping[str, str]:
        """Texts of the named tokens (`bos_token`, `eos_token`, …), which chat templates use."""
        return self._codec.special_texts

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Gives the ids of a text; special tokens that stand in it become their ids.

        Args:
            text: Any text.
            special: Whether start and end tokens are put around it, if the tokenizer does that.
        """
        return self._codec.encode(text, special)

    def decode(self, sequences: Sequence[Sequence[int]]) -> list[str]:
        """Gives the text of each id sequence.

        Special tokens are left out, and so are ids that the tokenizer does not have (rows with which an embedding is
        padded). Bytes that are no whole character are U+FFFD.
        """
        return [self._codec.decode([id_ for id_ in ids if 0 <= id_ < self.vocab]) for ids in sequences]
