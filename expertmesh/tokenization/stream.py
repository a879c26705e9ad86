"""Token ids that come one by one, as text that is safe to send. Does no input or output, and no decoding."""

from __future__ import annotations

from collections.abc import Sequence

from expertmesh.tokenization.byte_runs import ByteRuns
from expertmesh.tokenization.stop_strings import StopStrings, check_stops

UNKNOWN = "\ufffd"
MAX_OPEN_TAKES = 16
MAX_UNKNOWN_TAKES = 32
MAX_BYTES_OF_CHARACTER = 4
MIN_WINDOW = 4 * MAX_BYTES_OF_CHARACTER
MAX_SILENT = 64


class TextStream:
    """Turns a growing list of ids into pieces of text that, put together, are the text of all ids.

    The text of an id depends on its neighbours: a character may be spread over several ids, and SentencePiece leaves
    out the space before the first of a sequence. So the newest ids are decoded together with those before them, and
    what is new is told by its place. `windows` says which sequences' texts are needed, and `take` gets them:

        stream.push(id)
        piece = stream.take(decode(stream.windows()))
        ...
        rest = stream.finish()

    While the text ends in U+FFFD a character may be incomplete, and its beginning is held back; so is what may be the
    beginning of a stop string, and what `ByteRuns` says. A piece may be empty.

    Args:
        stops: Stop strings; the text ends before the one that starts first.
        vocab: How many ids can be decoded. With 0 runs of bytes are not looked into: where a decoder makes U+FFFD of
            valid bytes because invalid ones follow, the valid ones may have been given already.

    Raises:
        InvalidInput: There are too many stop strings, or one is empty or too long (field `stop`).
    """

    def __init__(self, stops: Sequence[str] = (), vocab: int = 0) -> None:
        check_stops(stops)
        self._stops = StopStrings(stops)
        self._runs = ByteRuns(vocab)
        self._ids: list[int] = []
        self._known = 0  # ids at the window's start whose text was taken
        self._whole = 0  # ids of those before the ones whose text was held back
        self._asked = 0
        self._held = ""
        self._held_takes = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string ended the text; `finish` can still find one."""
        return self._stops.stopped

    @property
    def matched(self) -> str:
        """The stop string that ended the text; empty where none did."""
        return self._stops.matched if self.stopped else ""

    def push(self, id_: int) -> None:
        """Appends an id."""
        if not self.stopped:
            self._ids.append(id_)

    def windows(self) -> list[list[int]]:
        """Gives the id sequences whose texts `take` needs; none when nothing is new.

        They are two or three, as long as what was pushed lately; at a stream's start there are some of one or two ids
        more. None of them is empty.
        """
        self._asked = len(self._ids)
        if self._asked == self._known or self.stopped:
            return []
        known = [self._ids[: self._known]] if self._known else []
        return [*known, list(self._ids), *self._runs.windows(self._ids)]

    def take(self, texts: Sequence[str]) -> str:
        """Gives the new text that is safe to send.

        Args:
            texts: Text of each of the latest `windows`.
        """
        if not texts:
            return ""
        known, text, *further = texts if self._known else ("", *texts)
        start = max(0, len(known) - len(self._held))
        new = text[start:]
        if not new and not self._held:
            self._runs.learn(further)
            self._skip_silent()
            return ""
        return self._stops.feed(self._advance(new, self._runs.closed(text, further)[start:]))

    def finish(self) -> str:
        """Gives the rest; to be called once, when every id was pushed and its text taken."""
        rest, self._held = self._held, ""
        return self._stops.feed(rest) + self._stops.finish()

    def _advance(self, new: str, closed: str) -> str:
        """Gives what cannot change any more of `new`, and moves the window."""
        is_unknown = new.endswith(UNKNOWN)
        is_open = len(closed) < len(new) and self._held_takes < MAX_OPEN_TAKES
        safe = min(new.rstrip(UNKNOWN), closed, key=len) if is_unknown or is_open else new
        self._held_takes = self._held_takes + 1 if is_unknown or is_open else 0
        start = 0 if self._held_takes else self._whole
        if is_unknown and self._held_takes > MAX_UNKNOWN_TAKES:  # no character, but perhaps for the last few bytes
            is_growing = len(new) > len(self._held)
            safe = new[: max(len(safe), len(new) - MAX_BYTES_OF_CHARACTER + 1)] if is_growing else new
            start = max(0, self._asked - MIN_WINDOW)
            self._held_takes = 0
        self._held = new[len(safe) :]
        self._known = self._asked - start
        self._whole = max(0, self._whole - start) if self._held else self._known
        self._ids = self._ids[start:]
        return safe

    def _skip_silent(self) -> None:
        """Drops new ids that have no text.

        An id that is silent only where it stands (a space at the start) is kept once; the second one has a text.
        """
        kept = self._ids[: self._known]
        for id_ in self._ids[self._known : self._asked]:
            if id_ not in kept and len(kept) < MAX_SILENT:
                kept.append(id_)
        self._ids = kept + self._ids[self._asked :]
        self._known = self._whole = len(kept)
