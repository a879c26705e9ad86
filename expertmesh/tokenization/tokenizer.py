"""A SentencePiece vocabulary with its normaliser: raw texts to token ids and back."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
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
        return cls(load_pieces(folder / MODEL_FILE), Normalizer.load(folder / NORMALIZER_FILE))

    @property
    def vocab(self) -> int:
        """Number of ids V; every id is in [0, V)."""
        return int(self._pieces.get_piece_size())

    def encode(self, texts: Sequence[str], max_tokens: int) -> Encoded:
        """Gives the first `max_tokens` tokens of each raw text.

        Only so much of a text is looked at as can matter: `RAW_CHARACTERS_PER_TOKEN` characters of the raw and
        `CHARACTERS_PER_TOKEN` of the normalised text for every token asked for. The time is bounded by that.
        """
        return self._encode(texts, max_tokens, self._pieces.encode)

    def sample(self, texts: Sequence[str], max_tokens: int, alpha: float, seed: int) -> Encoded:
        """Like `encode`, but draws each segmentation by its probability to the power of `alpha`.

        This is subword regularisation (Kudo, "Subword Regularization", ACL 2018), for training. SentencePiece keeps
        one random generator per thread and seeds it once, so every call draws in a thread of its own.
        """
        results: list[Encoded] = []

        def draw() -> None:
            sentencepiece.set_random_generator_seed(seed)
            sampling = partial(self._pieces.encode, enable_sampling=True, alpha=alpha, nbest_size=-1)
            results.append(self._encode(texts, max_tokens, sampling))

        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
        return results[0]

    def _encode(self, texts: Sequence[str], max_tokens: int, cut: Callable[[str], list[int]]) -> Encoded:
        ids: list[int] = []
        lengths, truncated = [], []
        for text in texts:
            raw = text[: max_tokens * RAW_CHARACTERS_PER_TOKEN]
            plain = self.normalizer(raw)
            seen = plain[: max_tokens * CHARACTERS_PER_TOKEN]
            pieces = cut(seen)
            ids += pieces[:max_tokens]
            lengths.append(min(len(pieces), max_tokens))
            truncated.append(len(raw) < len(text) or len(seen) < len(plain) or len(pieces) > max_tokens)
        return Encoded(np.array(ids, np.int32), np.array(lengths, np.int32), np.array(truncated, np.bool_))

    def decode(self, ids: Sequence[int]) -> str:
        """Gives the normalised text of token ids."""
        return str(self._pieces.decode([int(id_) for id_ in ids]))


def load_pieces(path: Path) -> sentencepiece.SentencePieceProcessor:
    """Reads a SentencePiece model.

    Raises:
        BadCheckpoint: The file is missing or damaged.
    """
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
