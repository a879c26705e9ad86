"""A SentencePiece vocabulary with its normaliser: raw texts to token ids and back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from expertmesh.errors import BadCheckpoint
from expertmesh.tokenization.normalizer import Normalizer

MODEL_FILE = "tokenizer.model"
NORMALIZER_FILE = "normalizer.json"
CHARACTERS_PER_TOKEN = 16
RAW_CHARACTERS_PER_TOKEN = 128


@dataclass(frozen=True)
class Encoded:
    """B texts as token ids.

    Attributes:
        ids_T: Ids of all texts, one after another.
        lengths_B: Tokens of each text; zero for a text of which nothing is left.
        truncated_B: Whether a part of the text was left out.
    """

    ids_T: npt.NDArray[np.int32]
    lengths_B: npt.NDArray[np.int32]
    truncated_B: npt.NDArray[np.bool_]


class Tokenizer:
    """Cuts texts into the pieces of a vocabulary.

    Args:
        pieces: A loaded SentencePiece model.
        normalizer: What happens to a text before.
    """

    def __init__(self, pieces: sentencepiece.SentencePieceProcessor, normalizer: Normalizer) -> None:
        self._pieces = pieces
        self.normalizer = normalizer

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Reads `tokenizer.model` and `normalizer.json`.

        Raises:
            BadCheckpoint: One of them is missing or damaged.
        """
        folder = Path(folder)
        return cls(_load_pieces(folder / MODEL_FILE), Normalizer.load(folder / NORMALIZER_FILE))

    @property
    def vocab(self) -> int:
        """Number of ids V; every id is in [0, V)."""
        return int(self._pieces.get_piece_size())

    def encode(self, texts: Sequence[str], max_tokens: int) -> Encoded:
        """Gives the first `max_tokens` tokens of each raw text.

        Only so much of a text is looked at as can matter: `RAW_CHARACTERS_PER_TOKEN` characters of the raw and
        `CHARACTERS_PER_TOKEN` of the normalised text for every token asked for. The time is bounded by that.
        """
        normalised, truncated = [], []
        for text in texts:
            raw_end = max_tokens * RAW_CHARACTERS_PER_TOKEN
            plain = self.normalizer(text[:raw_end])
            normalised.append(plain[: max_tokens * CHARACTERS_PER_TOKEN])
            truncated.append(len(text) > raw_end or len(plain) > len(normalised[-1]))
        pieces = self._pieces.encode(normalised, out_type=int, num_threads=1) if normalised else []
        ids = [id_ for text_ids in pieces for id_ in text_ids[:max_tokens]]
        return Encoded(
            np.array(ids, dtype=np.int32),
            np.array([min(len(text_ids), max_tokens) for text_ids in pieces], dtype=np.int32),
            np.array(
                [cut or len(text_ids) > max_tokens for cut, text_ids in zip(truncated, pieces, strict=True)], bool
            ),
        )

    def decode(self, ids: Sequence[int]) -> str:
        """Gives the normalised text of token ids."""
        return str(self._pieces.decode([int(id_) for id_ in ids]))


def _load_pieces(path: Path) -> sentencepiece.SentencePieceProcessor:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadCheckpoint(f"{path}: cannot be read ({error.strerror})") from None
    try:
        pieces = sentencepiece.SentencePieceProcessor(model_proto=content)
        if content and pieces.get_piece_size() > 0:
            return pieces
    except (RuntimeError, TypeError, ValueError):
        pass
    raise BadCheckpoint(f"{path}: is not a SentencePiece model")
