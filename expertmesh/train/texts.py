"""Running texts to learn from, and which part of them is held out: the last tenth of the first file.

That is the split that nanoGPT (Karpathy, 2022) makes of Tiny Shakespeare: by characters, in the order of the file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from expertmesh.errors import SetupError

TRAINING_SHARE = 0.9
WIKITEXT_SUFFIX = ".tokens"

_UNDONE = (
    (re.compile(r" @([-,.])@ "), r"\1"),
    (re.compile(r"<unk>"), ""),
    (re.compile(r" ([,.;:!?%)\]])"), r"\1"),
    (re.compile(r"([(\[$£]) "), r"\1"),
    (re.compile(r" (n't|'(?:s|t|re|ve|ll|d|m)\b)"), r"\1"),
    (re.compile(r'" ([^"\n]*?) "'), r'"\1"'),
    (re.compile(r" {2,}"), " "),
    (re.compile(r"^ | $", re.MULTILINE), ""),
    (re.compile(r"\n{2,}"), "\n\n"),
)


@dataclass(frozen=True)
class Texts:
    """What one run reads.

    Attributes:
        main: The first nine tenths of the first file.
        others: The other files.
        heldout: The rest of the first file.
    """

    main: str
    others: tuple[str, ...]
    heldout: str


def read_texts(paths: Sequence[Path]) -> Texts:
    """Reads text files; `.tokens` is a WikiText file, whose tokenisation is undone (see `undo_wikitext`).

    Raises:
        SetupError: A file cannot be read, or the first is too short to be parted.
    """
    first, *others = [read_text(path) for path in paths]
    cut = int(len(first) * TRAINING_SHARE)
    if not first[:cut] or not first[cut:]:
        raise SetupError(f"{paths[0]}: too short to be learnt from and judged by")
    return Texts(first[:cut], tuple(others), first[cut:])


def read_text(path: Path) -> str:
    """Reads one file as UTF-8.

    Raises:
        SetupError: It cannot be read.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise SetupError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise SetupError(f"{path}: is not UTF-8 ({error.reason} at byte {error.start})") from None
    return undo_wikitext(text) if path.suffix == WIKITEXT_SUFFIX else text


def undo_wikitext(text: str) -> str:
    """Joins what WikiText (Merity et al., 2016) set apart, about as its articles were written; unknown words go."""
    for pattern, replacement in _UNDONE:
        text = pattern.sub(replacement, text)
    return text.strip() + "\n"


def lines_of(text: str) -> list[str]:
    """Cuts a text behind its runs of newlines; joined again the pieces are the text."""
    return re.findall(r"[^\n]*\n+|[^\n]+$", text)
