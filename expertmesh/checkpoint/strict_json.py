"""JSON from files that nobody vouches for: one object of bounded size, no key twice, no NaN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from expertmesh.errors import BadCheckpoint


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """Reads one JSON object.

    Raises:
        BadCheckpoint: It is no JSON, no object, has a key twice, a number that is not finite, or is nested too deeply.
    """
    try:
        values = json.loads(data, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise BadCheckpoint(f"{what} is no JSON that is understood: {error}") from None
    if not isinstance(values, dict):
        raise BadCheckpoint(f"{what} holds no JSON object")
    return values


def read_object(path: Path, max_bytes: int) -> dict[str, Any]:
    """Reads one JSON object from a file.

    Raises:
        BadCheckpoint: The file cannot be read, is larger than `max_bytes`, or see `parse_object`.
    """
    return parse_object(read_file(path, max_bytes), str(path))


def read_file(path: Path, max_bytes: int) -> bytes:
    """Reads a regular file.

    Raises:
        BadCheckpoint: There is none, it cannot be read, or it is larger than `max_bytes`.
    """
    if not path.is_file():
        raise BadCheckpoint(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise BadCheckpoint(f"{path} cannot be read: {error.strerror}") from None
    if len(data) > max_bytes:
        raise BadCheckpoint(f"{path} is larger than {max_bytes} bytes")
    return data


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} occurs twice")
    return values


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")
