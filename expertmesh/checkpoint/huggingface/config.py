"""`config.json`: every key that decides what is computed is read, and what was not read must be known not to matter.

Keys that are missing have the defaults of the transformers class of that model type, as with transformers itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

from expertmesh.checkpoint.huggingface.irrelevant import IRRELEVANT
from expertmesh.errors import BadCheckpoint

FILE_NAME = "config.json"
GENERATION_FILE = "generation_config.json"
MAX_CONFIG_BYTES = 4 * 2**20
MAX_INTEGER = 2**31 - 1

SYNONYMS = (
    ("num_local_experts", "num_experts", "n_routed_experts"),
    ("num_experts_per_tok", "experts_per_token"),
    ("num_nextn_predict_layers", "num_mtp_layers"),
)


class Config:
    """The keys of a `config.json`, each checked as it is read.

    Args:
        values: The file's content.
        where: What errors call the file.
        asked_context: The context that the model shall have, or None.

    Raises:
        BadCheckpoint: From every method: a value is not understood.
    """

    def __init__(self, values: Mapping[str, Any], where: str, asked_context: int | None = None) -> None:
        self._values = dict(values)
        self._defaults: Mapping[str, Any] = {}
        self._where = where
        self._read: set[str] = {"model_type"}
        self.asked_context = asked_context
        for synonyms in SYNONYMS:
            given = [key for key in synonyms if self._values.get(key) is not None]
            if any(self._values[key] != self._values[given[0]] for key in given):
                raise self.error(f"{' and '.join(given)} mean the same and differ")

    def with_defaults(self, defaults: Mapping[str, Any]) -> Config:
        """Sets what missing keys stand for."""
        self._defaults = defaults
        return self

    def error(self, message: str) -> BadCheckpoint:
        """An error about this file, to be raised."""
        return BadCheckpoint(f"{self._where}: {message}")

    def has(self, key: str) -> bool:
        """Whether the file itself says something about a key."""
        return self._values.get(key) is not None

    def value(self, key: str) -> Any:
        """What the file says, or else the default; None where there is neither."""
        names = next((synonyms for synonyms in SYNONYMS if key in synonyms), (key,))
        self._read.update(names)
        given = [self._values[name] for name in names if name in self._values]
        if given:
            return next((value for value in given if value is not None), None)
        return self._defaults.get(key)

    def integer(self, key: str, minimum: int = 1) -> int:
        """A whole number of at least `minimum`."""
        value = self.value(key)
        if type(value) is not int or not minimum <= value <= MAX_INTEGER:
            raise self.error(f"{key} must be a whole number from {minimum} to {MAX_INTEGER}, not {shown(value)}")
        return value

    def optional_integer(self, key: str, minimum: int = 1) -> int | None:
        """A whole number, or None for null."""
        return None if self.value(key) is None else self.integer(key, minimum)

    def number(self, key: str) -> float:
        """A finite number."""
        value = self.value(key)
        if type(value) not in (int, float) or not isfinite(value):
            raise self.error(f"{key} must be a number, not {shown(value)}")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false."""
        value = self.value(key)
        if type(value) is not bool:
            raise self.error(f"{key} must be true or false, not {shown(value)}")
        return value

    def table(self, key: str) -> dict[str, Any]:
        """An object; empty for null."""
        value = self.value(key)
        if value is not None and not isinstance(value, dict):
            raise self.error(f"{key} must be an object, not {shown(value)}")
        return value or {}

    def integers(self, key: str) -> list[int]:
        """A list of whole numbers; empty for null."""
        value = self.value(key)
        if value is not None and not (isinstance(value, list) and all(type(entry) is int for entry in value)):
            raise self.error(f"{key} must be a list of whole numbers, not {shown(value)}")
        return value or []

    def only(self, key: str, *allowed: Any) -> Any:
        """A value of which only these are implemented; what is missing in file and defaults is the first of them."""
        value = self.value(key)
        if value is None:
            return allowed[0]
        if not any(value == entry and type(value) is type(entry) for entry in allowed):
            known = ", ".join(map(shown, allowed))
            raise self.error(f"{key} = {shown(value)} is not implemented; implemented: {known}")
        return value

    def check_all_read(self) -> None:
        """Refuses keys that nobody read and that are not known to be irrelevant."""
        for key, value in self._values.items():
            if key in self._read or key in IRRELEVANT or key.startswith("_") or value is None:
                continue
            raise self.error(
                f"{key} = {shown(value)} is not understood and may change what the model computes;"
                " take it out of the file if you know that it does not"
            )


def shown(value: Any) -> str:
    """A value for an error message, cut short."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
