"""Makes a tokenizer from training texts: a SentencePiece unigram vocabulary and its normaliser."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from expertmesh.errors import SetupError
from expertmesh.tokenization.normalizer import KEPT_PUNCTUATION, Normalizer
from expertmesh.tokenization.tokenizer import MODEL_FILE, NORMALIZER_FILE, Tokenizer
from expertmesh.train.checkpoint import write_atomically
from expertmesh.train.settings import TokenizerConfig

WORD_START = "\u2581"


def make_tokenizer(texts: Sequence[str], config: TokenizerConfig, vocab: int, folder: Path) -> Tokenizer:
    """Learns at most `vocab` pieces and writes them, with the normaliser, to `folder`; the same texts give the same.

    Punctuation marks that the normaliser sets apart are one piece each, together with the space before them.

    Raises:
        SetupError: There are too few texts for a vocabulary.
    """
    normalizer = Normalizer(config.steps)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(list(filter(None, map(normalizer, texts)))),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab,
            hard_vocab_limit=False,
            character_coverage=config.character_coverage,
            normalization_rule_name="identity",
            user_defined_symbols=[WORD_START + mark for mark in KEPT_PUNCTUATION],
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise SetupError(f"no vocabulary of {vocab} pieces can be made of {len(texts)} texts ({error})") from None
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / MODEL_FILE, model.getvalue())
    write_atomically(folder / NORMALIZER_FILE, normalizer.to_json().encode())
    return Tokenizer.load(folder)
