"""Makes the vocabulary of a language model: SentencePiece BPE that loses nothing of a text."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from expertmesh.errors import SetupError
from expertmesh.tokenization.tokenizer import MODEL_FILE, load_pieces
from expertmesh.train.checkpoint import write_atomically
from expertmesh.train.settings import TokenizerConfig
from expertmesh.train.texts import lines_of

CONFIG_FILE = "tokenizer_config.json"
CONFIG = {"add_bos_token": False, "add_eos_token": False, "add_prefix_space": False, "legacy": False}
MAX_LINE_BYTES = 2**20


class Pieces:
    """Cuts texts into the pieces of a vocabulary and nothing else.

    Args:
        folder: Where `tokenizer.model` is.

    Raises:
        BadCheckpoint: It is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._pieces = load_pieces(folder / MODEL_FILE)
        self.vocab = int(self._pieces.get_piece_size())

    def encode(self, text: str) -> npt.NDArray[np.int64]:
        """Gives the ids of a text."""
        return np.array(self._pieces.encode(text), np.int64)

    def sample(self, text: str, alpha: float, seed: int) -> npt.NDArray[np.int64]:
        """Gives ids of a text with merges left out at the rate `alpha`, for training.

        This is BPE-dropout (Provilkov et al., ACL 2020). SentencePiece keeps one random generator per thread and
        seeds it once, so every call draws in a thread of its own.
        """
        ids: list[int] = []

        def draw() -> None:
            sentencepiece.set_random_generator_seed(seed)
            for line in lines_of(text):
                ids.extend(self._pieces.encode(line, enable_sampling=True, alpha=alpha, nbest_size=-1))

        thread = threading.Thread(target=draw)
        thread.start()
        thread.join()
        return np.array(ids, np.int64)


def make_pieces(text: str, config: TokenizerConfig, vocab: int, folder: Path) -> Pieces:
    """Learns exactly `vocab` pieces and writes them to `folder`; the same text gives the same.

    Spaces and newlines stay as they are; a newline is a piece of its own; characters without a piece are spelt in
    bytes. Ids 0, 1 and 2 are SentencePiece's unknown, start and end token.

    Raises:
        SetupError: The text does not give that many pieces, or has more characters than that.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines_of(text)),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab,
            character_coverage=config.character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            user_defined_symbols=["\n"],
            max_sentence_length=MAX_LINE_BYTES,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise SetupError(f"no vocabulary of {vocab} pieces can be made of {len(text)} characters ({error})") from None
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / MODEL_FILE, model.getvalue())
    write_atomically(folder / CONFIG_FILE, (json.dumps(CONFIG, indent=2) + "\n").encode())
    return Pieces(folder)
