"""What happens to a text before it is cut into pieces.

A normaliser is an ordered list of named steps, stored beside the vocabulary (`normalizer.json`), so that training
and serving cannot drift apart. Every step takes linear time, whatever the text. Applying all steps twice gives what
applying them once gives: `NEWS_STEPS` ends in a form in which no step finds anything to do.
"""

from __future__ import annotations

import html.entities
import json
import re
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

from expertmesh.errors import BadCheckpoint

VERSION = 1
KEPT_PUNCTUATION = ".?!$%():-"
MAX_CACHED_CHARACTERS = 1 << 16

_NUMERIC_ENTITY = re.compile(r"&? ?# ?(?:x([0-9a-fA-F]{2,6})|([0-9]{2,7})) ?;")
_NAMED_ENTITY = re.compile(r"&([A-Za-z][A-Za-z0-9]{1,30});")
_BROKEN_ENTITY = re.compile(r"(?:& ?)?\b(quot|apos|amp|lt|gt|nbsp) ?;")
_BROKEN = {"quot": '"', "apos": "'", "amp": "&", "lt": "<", "gt": ">", "nbsp": " "}
_TAG = re.compile(
    r"<\s?/?\s?(?:a|b|i|u|p|br|em|strong|font|span|div|img|table|tbody|tr|td|th|ul|ol|li|center|script|h[1-6])"
    r"(?:[\s/][^<>]{0,1000})?(?:>|\Z)",
    re.IGNORECASE,
)
_CONTRACTION = re.compile(r"\s(n['\u2019]t)\b", re.IGNORECASE)
_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3})")
_INNER_HYPHEN = re.compile(r"(?<=[^\W\d_]|\.)-(?=\w)|(?<=\d)-(?=[^\W\d_])")
_TOKEN = re.compile(r"\d+(?:[.:-]\d+)+|[^\s.?!$%():-]+|[.?!$%():-]")


def unescape_entities(text: str) -> str:
    """HTML entities to characters, also those that lost their ampersand (`#39;`, `quot;`, `& lt ;`); two deep."""
    for _ in range(2):
        if ";" not in text:
            break
        text = _NUMERIC_ENTITY.sub(_numeric, text)
        text = _NAMED_ENTITY.sub(lambda match: html.entities.html5.get(f"{match[1]};", " "), text)
        text = _BROKEN_ENTITY.sub(lambda match: _BROKEN[match[1]], text)
    return text


def _numeric(match: re.Match[str]) -> str:
    code = int(match[1], 16) if match[1] else int(match[2])
    return chr(code) if 0x20 <= code <= 0x10FFFF and not 0xD800 <= code <= 0xDFFF else " "


def remove_tags(text: str) -> str:
    """HTML tags to spaces; an unknown name in angle brackets (`<DELL.O>`) is text."""
    return _TAG.sub(" ", text) if "<" in text else text


def join_contractions(text: str) -> str:
    """`do n't` to `don't`, as before the source tokenised it."""
    return _CONTRACTION.sub(r"\1", text)


def join_thousands(text: str) -> str:
    """`7,000` to `7000`."""
    return _THOUSANDS.sub("", text)


class _Characters(dict[int, str]):
    """Code point to what becomes of it; filled as characters are met.

    A character is decomposed (NFKD), loses its Latin accents, and is lower-cased. Punctuation, symbols and controls
    become a space, but for `KEPT_PUNCTUATION`. Characters are seen one by one: normalising a whole text takes
    quadratic time when someone sends a hundred thousand combining marks.
    """

    def __missing__(self, code: int) -> str:
        becomes = self._becomes(code)
        if len(self) < MAX_CACHED_CHARACTERS:
            self[code] = becomes
        return becomes

    @staticmethod
    def _becomes(code: int) -> str:
        plain = "".join(c for c in unicodedata.normalize("NFKD", chr(code)) if not "\u0300" <= c <= "\u036f")
        plain = unicodedata.normalize("NFKC", plain.lower())
        plain = "".join(c for c in plain if not "\u0300" <= c <= "\u036f")
        return "".join(c if c in KEPT_PUNCTUATION or unicodedata.category(c)[0] in "LNM" else " " for c in plain)


_CHARACTERS = _Characters()


def plain_characters(text: str) -> str:
    """Lower case, no accents, compatibility forms resolved, and little punctuation left (see `_Characters`)."""
    return text.translate(_CHARACTERS)


def split_punctuation(text: str) -> str:
    """Puts one space between words, numbers and marks; hyphened words are two, a mark twice in a row counts once."""
    tokens: list[str] = []
    for token in _TOKEN.findall(_INNER_HYPHEN.sub(" ", text)):
        if not (tokens and token == tokens[-1] and token in KEPT_PUNCTUATION):
            tokens.append(token)
    return " ".join(tokens)


def join_acronyms(text: str) -> str:
    """`u . s .` to `us`; expects marks split off, as `split_punctuation` leaves them."""
    tokens = text.split()
    joined: list[str] = []
    at = 0
    while at < len(tokens):
        end = at + 1
        while end + 1 < len(tokens) and tokens[end] == "." and _is_letter(tokens[end - 1], tokens[end + 1]):
            end += 2
        if end == at + 1:
            joined.append(tokens[at])
        else:
            joined.append("".join(tokens[at:end:2]))
            end += end < len(tokens) and tokens[end] == "."
        at = end
    return " ".join(joined)


def _is_letter(*tokens: str) -> bool:
    return all(len(token) == 1 and token.isalpha() for token in tokens)


STEPS: dict[str, Callable[[str], str]] = {
    "unescape_entities": unescape_entities,
    "remove_tags": remove_tags,
    "join_contractions": join_contractions,
    "join_thousands": join_thousands,
    "plain_characters": plain_characters,
    "split_punctuation": split_punctuation,
    "join_acronyms": join_acronyms,
}
NEWS_STEPS = tuple(STEPS)


class Normalizer:
    """Applies named steps in order.

    Args:
        steps: Names from `STEPS`.

    Raises:
        BadCheckpoint: A step is not known.
    """

    def __init__(self, steps: Sequence[str] = NEWS_STEPS) -> None:
        unknown = [step for step in steps if step not in STEPS]
        if unknown:
            raise BadCheckpoint(f"normalizer: step {unknown[0]!r} is not known; known: {', '.join(STEPS)}")
        self.steps = tuple(steps)

    def __call__(self, text: str) -> str:
        """Gives the normalised text; never fails, whatever the text."""
        for step in self.steps:
            text = STEPS[step](text)
        return text

    def to_json(self) -> str:
        """Gives the text of `normalizer.json`."""
        return json.dumps({"steps": list(self.steps), "version": VERSION}, indent=2) + "\n"

    @classmethod
    def load(cls, path: Path) -> Normalizer:
        """Reads `normalizer.json`.

        Raises:
            BadCheckpoint: It is missing, damaged, of another version, or names an unknown step.
        """
        try:
            values = json.loads(path.read_bytes())
        except OSError as error:
            raise BadCheckpoint(f"{path}: cannot be read ({error.strerror})") from None
        except ValueError:
            raise BadCheckpoint(f"{path}: is not JSON") from None
        steps = values.get("steps") if isinstance(values, dict) and values.get("version") == VERSION else None
        if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
            raise BadCheckpoint(f"{path}: is not a normaliser of version {VERSION}")
        return cls(steps)
