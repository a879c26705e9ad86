"""Labelled texts from CSV, without duplicates, and which of them are held out.

**The key of a description** decides what a duplicate is and what is held out: HTML entities are unescaped (also
those that lost their ampersand, as AG News has them: `#39;`, `quot;`), HTML tags removed, the text lower-cased, and
everything but the letters a-z and the digits 0-9 removed. A lower-cased or tokenised copy of a row has the same key.

**Held out** are the rows whose SHA-1 of that key (UTF-8, as an integer, big-endian) is 0 modulo `HELDOUT_MODULUS`.

A file may hold one story in several kinds: with its title, without it, or both merged into one string, of which
nobody says where the title ends. A merged text that ends with a description known from another row has that
description's key. Training rows that share a run of `GUARD_CHARACTERS` with the beginning or the end of a held-out
key are left out as well, so that a cut or damaged copy of a held-out row is not learnt from either.
"""

from __future__ import annotations

import csv
import hashlib
import lzma
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

from expertmesh.errors import SetupError
from expertmesh.tokenization.normalizer import remove_tags, unescape_entities

HELDOUT_MODULUS = 20
GUARD_CHARACTERS = 64
MIN_SUFFIX_CHARACTERS = 24
COLUMNS = ("class_index", "title", "description")
_NOT_ALPHANUMERIC = re.compile(r"[^a-z0-9]+")
_KIND_ORDER = {"title+description": 0, "merged": 1, "description": 2}


@dataclass(frozen=True)
class Row:
    """One labelled story.

    Attributes:
        label: Class, counted from 0.
        title: May be empty.
        description: The story, or title and story where `kind` is "merged".
        kind: "title+description", "description" or "merged".
        altered: Whether the source lower-cased or tokenised the text.
        key: Key of the description (see the module); empty until `split` has found it.
    """

    label: int
    title: str
    description: str
    kind: str = "title+description"
    altered: bool = False
    key: str = ""

    @property
    def text(self) -> str:
        """What a model is shown: title and description in one string."""
        return f"{self.title} {self.description}".strip()


@dataclass(frozen=True)
class Split:
    """Rows to learn from, rows to judge by, and how many were neither."""

    training: list[Row]
    heldout: list[Row]
    duplicates: int
    guarded: int


def read_rows(path: Path, classes: int) -> list[Row]:
    """Reads `class,title,description` without a header, or a file whose header names at least these columns.

    The header calls the class `class_index` or `Class Index`, and may have `kind` and `altered`. Classes count from 1.
    `.xz` is unpacked.

    Raises:
        SetupError: The file cannot be read, a row has too few columns, or a class is not in [1, classes].
    """
    try:
        with _open(path) as file:
            return [_row(cells, where, classes) for where, cells in _cells(file, path)]
    except (OSError, lzma.LZMAError, UnicodeDecodeError, csv.Error) as error:
        raise SetupError(f"{path}: cannot be read ({error})") from None


def _open(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _cells(file: IO[str], path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    reader = csv.reader(file)
    names: Sequence[str] = COLUMNS
    for number, cells in enumerate(reader):
        header = [cell.strip().lower().replace(" ", "_") for cell in cells]
        if number == 0 and "class_index" in header:
            names = header
        elif cells:
            yield f"{path}, line {reader.line_num}", dict(zip(names, cells, strict=False))


def _row(cells: dict[str, str], where: str, classes: int) -> Row:
    if not all(column in cells for column in COLUMNS):
        raise SetupError(f"{where}: needs the columns {', '.join(COLUMNS)}")
    label = cells["class_index"]
    if not (label.isdecimal() and 1 <= int(label) <= classes):
        raise SetupError(f"{where}: class {label!r} is not in [1, {classes}]")
    return Row(
        label=int(label) - 1,
        title=cells["title"],
        description=cells["description"],
        kind=cells.get("kind", "title+description"),
        altered=cells.get("altered", "0") == "1",
    )


def description_key(description: str) -> str:
    """The normalised description that duplicates and held-out rows are found by (see the module)."""
    return _NOT_ALPHANUMERIC.sub("", remove_tags(unescape_entities(description)).lower())


def is_heldout(key: str) -> bool:
    """Whether rows of this key are held out."""
    digest = hashlib.sha1(key.encode(), usedforsecurity=False).digest()
    return int.from_bytes(digest, "big") % HELDOUT_MODULUS == 0


def split(rows: Iterable[Row]) -> Split:
    """Drops duplicates and parts the rest; a function of the rows alone, in their order.

    Of rows with one key the one that says most stays: with title before merged before without, unaltered first.
    """
    keyed = _keyed(list(rows))
    best: dict[str, Row] = {}
    for row in sorted(keyed, key=lambda row: (_KIND_ORDER.get(row.kind, 3), row.altered)):
        best.setdefault(row.key, row)
    unique = [row for row in keyed if best[row.key] is row]
    heldout = [row for row in unique if is_heldout(row.key)]
    guards = {guard for row in heldout for guard in _guards(row.key)}
    candidates = [row for row in unique if not is_heldout(row.key)]
    training = [row for row in candidates if not _touches(row, guards)]
    return Split(training, heldout, len(keyed) - len(unique), len(candidates) - len(training))


def _keyed(rows: list[Row]) -> list[Row]:
    keyed = [replace(row, key=description_key(row.description)) for row in rows]
    known = {row.key for row in keyed if row.kind != "merged" and len(row.key) >= MIN_SUFFIX_CHARACTERS}
    return [row if row.kind != "merged" else replace(row, key=_known_suffix(row.key, known)) for row in keyed]


def _known_suffix(key: str, known: set[str]) -> str:
    starts = range(1, max(len(key) - MIN_SUFFIX_CHARACTERS + 1, 1))
    return next((key[start:] for start in starts if key[start:] in known), key)


def _guards(key: str) -> tuple[str, ...]:
    return (key[:GUARD_CHARACTERS], key[-GUARD_CHARACTERS:]) if len(key) >= GUARD_CHARACTERS else ()


def _touches(row: Row, guards: set[str]) -> bool:
    key = description_key(row.description)
    return any(key[start : start + GUARD_CHARACTERS] in guards for start in range(len(key) - GUARD_CHARACTERS + 1))
