"""Tells whether further ids can change the text of a run of bytes that already looks whole."""

from __future__ import annotations

from collections.abc import Sequence

UNKNOWN = "\ufffd"
HALF_OF_BYTES = 128
MAX_FIRST_BYTE = 1024


class ByteRuns:
    """Watches for decoders that judge a run of byte tokens as a whole.

    The byte fallback of the `tokenizers` library does: the ids of `a` and of an invalid byte become two U+FFFD. So the
    `a` is not certain until an id comes that is no byte. Which ids are bytes a stream does not know, but it can ask
    what its text were if an invalid byte followed. To find one, it once asks for the texts of a few ids: the tokens of
    the 256 bytes stand one after another in such vocabularies, so among every 128th id there is one of the upper half,
    and 128 before it stands a byte that is a character of its own.

    Args:
        vocab: How many ids there are; 0 not to watch.
    """

    def __init__(self, vocab: int) -> None:
        self._candidates = list(range(HALF_OF_BYTES, min(vocab, MAX_FIRST_BYTE + 1), HALF_OF_BYTES))
        self._invalid: int | None = None

    def windows(self, ids: Sequence[int]) -> list[list[int]]:
        """Gives the sequences whose texts are needed to judge `ids`."""
        if self._candidates:
            pairs = [[[id_ - HALF_OF_BYTES], [id_ - HALF_OF_BYTES, id_]] for id_ in self._candidates]
            return [window for pair in pairs for window in pair] + [[*ids, id_] for id_ in self._candidates]
        return [] if self._invalid is None else [[*ids, self._invalid]]

    def learn(self, texts: Sequence[str]) -> str | None:
        """Takes the texts of `windows`; gives that of the ids with an invalid byte behind, where there is such."""
        if not self._candidates:
            return texts[0] if texts else None
        candidates, self._candidates = self._candidates, []
        probed = texts[2 * len(candidates) :]
        for index, id_ in enumerate(candidates):
            first, both = texts[2 * index : 2 * index + 2]
            if both == UNKNOWN * 2 and len(first) == 1 and first != UNKNOWN:
                self._invalid = id_
                return probed[index]
        return None

    def closed(self, text: str, texts: Sequence[str]) -> str:
        """Gives the beginning of `text` that no further id changes.

        Args:
            text: The text of the ids.
            texts: The texts of `windows` of the same ids.
        """
        probed = self.learn(texts)
        if probed is None or probed.startswith(text):
            return text
        differing = (at for at, (one, other) in enumerate(zip(text, probed, strict=False)) if one != other)
        return text[: next(differing, len(probed))]
