"""Text to ids and back as a SentencePiece `tokenizer.model` says, with the special tokens that models put around."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import sentencepiece

from expertmesh.tokenization.token_settings import TokenSettings
from expertmesh.tokenization.tokenizer import load_pieces

# Appended to a serialized model this sets `normalizer_spec.add_dummy_prefix` to false: a message that occurs twice in
# a protobuf is merged, and the later value of a field counts.
_NO_PREFIX = b"\x1a\x02\x18\x00"


class PieceCodec:
    """A loaded `tokenizer.model`.

    SentencePiece itself takes special tokens in a text (`<s>`, `</s>`) for plain characters. Here they become their
    ids, as in every library that serves such models; without that no chat template would work.

    Args:
        path: The file.
        settings: What the files beside it say. Where they are silent a text gets a start token and no end token.

    Raises:
        BadCheckpoint: The file is missing or damaged.
    """

    def __init__(self, path: Path, settings: TokenSettings) -> None:
        self._pieces = load_pieces(path)
        self._unprefixed = sentencepiece.SentencePieceProcessor(
            model_proto=self._pieces.serialized_model_proto() + _NO_PREFIX
        )
        self._first = self._pieces if settings.prefix_space else self._unprefixed
        self._later = self._first if settings.legacy else self._unprefixed
        self._size = int(self._pieces.get_piece_size())
        self._added = {id_: token.content for id_, token in settings.added if id_ >= self._size}
        self.vocab = max(self._size, 1 + max(self._added, default=-1))
        self.special_texts = self._named() | settings.named
        self._special_ids = self._find_special(settings)
        self._text2id = {self._pieces.id_to_piece(id_): id_ for id_ in self._special_ids if id_ < self._size}
        self._text2id |= {token.content: id_ for id_, token in settings.added}
        longest_first = sorted(filter(None, self._text2id), key=len, reverse=True)
        self._split = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")" if longest_first else r"(?!)()")
        self._start = self._mark("bos_token", self._pieces.bos_id(), settings.add_bos is not False)
        self._end = self._mark("eos_token", self._pieces.eos_id(), settings.add_eos is True)

    def encode(self, text: str, special: bool) -> list[int]:
        """Gives the ids of a text."""
        ids: list[int] = []
        for index, section in enumerate(self._split.split(text)):
            if index % 2:
                ids.append(self._text2id[section])
            elif section:
                ids += (self._later if index else self._first).encode(section)
        return [*self._start, *ids, *self._end] if special else ids

    def decode(self, ids: Sequence[int]) -> str:
        """Gives the text of ids in [0, vocab), without special tokens."""
        kept = [id_ for id_ in ids if id_ not in self._special_ids]
        texts: list[str] = []
        for is_piece, group in groupby(kept, lambda id_: id_ < self._size):
            if is_piece:
                texts.append((self._later if texts else self._first).decode(list(group)))
            else:
                texts += [self._added.get(id_, "") for id_ in group]
        return "".join(texts)

    def _named(self) -> dict[str, str]:
        pieces = self._pieces
        ids = {"bos_token": pieces.bos_id(), "eos_token": pieces.eos_id(), "unk_token": pieces.unk_id()}
        return {name: pieces.id_to_piece(id_) for name, id_ in ids.items() if id_ >= 0}

    def _find_special(self, settings: TokenSettings) -> frozenset[int]:
        pieces = self._pieces
        special = {id_ for id_ in range(self._size) if pieces.is_control(id_) or pieces.is_unknown(id_)}
        special |= {id_ for id_, token in settings.added if token.special}
        for text in (*settings.named.values(), *settings.special):
            id_ = pieces.piece_to_id(text)
            if id_ != pieces.unk_id():
                special.add(id_)
        return frozenset(special)

    def _mark(self, name: str, default: int, wanted: bool) -> list[int]:
        """The id put at a text's start or end, if any."""
        text = self.special_texts.get(name, "")
        id_ = self._text2id.get(text, default)
        return [id_] if wanted and id_ >= 0 else []
