"""A JSON object whose fields are taken out one by one, each checked; those that nobody took are refused by name."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from expertmesh.errors import InvalidInput

INT32_MAX = 2**31 - 1
INT64_MIN = -(2**63)
UINT64_MAX = 2**64 - 1
ValueT = TypeVar("ValueT")


class Fields:
    """The fields of an object; `null` counts as not given.

    Args:
        values: The object.
        where: What comes before the names of its fields in errors, as in `messages[3].`.

    Raises:
        InvalidInput: From every method, for a value of another type or out of range. Its `field` is the name.
    """

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self._values = {name: value for name, value in values.items() if value is not None}
        self._where = where

    def take(self, name: str) -> Any:
        """A field as it is; None if it is not there."""
        return self._values.pop(name, None)

    def integer(self, name: str, low: int, high: int = INT32_MAX) -> int | None:
        """A whole number in [low, high]. A boolean is none, 3.0 neither."""
        value = self.take(name)
        if value is None or (type(value) is int and low <= value <= high):
            return value
        raise self.error(name, f"must be a whole number in [{low}, {high}]")

    def number(self, name: str, low: float, high: float, above: bool = False) -> float | None:
        """A number in [low, high], or in (low, high] if it must be above."""
        value = self.take(name)
        if value is None:
            return None
        if type(value) in (int, float) and low <= value <= high and not (above and value == low):
            return float(value)
        raise self.error(name, f"must be a number in {'(' if above else '['}{low:g}, {high:g}]")

    def flag(self, name: str) -> bool:
        """A boolean; false if it is not given."""
        value = self.take(name)
        if value is None or isinstance(value, bool):
            return bool(value)
        raise self.error(name, "must be true or false")

    def string(self, name: str) -> str | None:
        """A string that is valid Unicode."""
        value = self.take(name)
        return None if value is None else self.checked_string(value, name)

    def choice(self, name: str, known: Mapping[str, ValueT], default: ValueT) -> ValueT:
        """What one of the known names stands for."""
        value = self.take(name)
        if value is None:
            return default
        if not isinstance(value, str) or value not in known:
            raise self.error(name, f"must be one of {', '.join(known)}")
        return known[value]

    def integers(self, name: str, most: int) -> list[int]:
        """A list of at most so many int32 numbers that are not negative."""
        value = self.take(name)
        return [] if value is None else self.checked_ids(value, name, most)

    def strings(self, name: str, most: int) -> list[str]:
        """One string, or a list of at most so many; an empty string by itself is none."""
        value = self.take(name)
        if value is None:
            return []
        if isinstance(value, str):
            value = [value] if value else []
        if not isinstance(value, list):
            raise self.error(name, "must be a string or a list of strings")
        if len(value) > most:
            raise self.error(name, f"has {len(value)} entries; at most {most}")
        return [self.checked_string(entry, f"{name}[{index}]") for index, entry in enumerate(value)]

    def seed(self, name: str) -> int | None:
        """A uint64. OpenAI's seeds are int64: a negative one stands for its two's complement, so -1 is 2**64 - 1."""
        value = self.integer(name, INT64_MIN, UINT64_MAX)
        return None if value is None else value % 2**64

    def object(self, name: str) -> Fields | None:
        """An object within this one."""
        value = self.take(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "must be an object")
        return Fields(value, f"{self._where}{name}.")

    def neutral(self, name: str, *allowed: Any, otherwise: str = "leave it out") -> None:
        """Takes a field that may only have a value that changes nothing.

        Args:
            name: The field.
            allowed: Such values.
            otherwise: What to do, for whoever sent another.
        """
        value = self.take(name)
        if value is None or any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in allowed):
            return
        raise self.error(name, f"is not supported; {otherwise}")

    def ignore(self, names: Collection[str]) -> None:
        """Takes fields whose values do not matter."""
        for name in names:
            self.take(name)

    def end(self) -> None:
        """Refuses whatever was not taken."""
        if self._values:
            unknown = sorted(self._values)
            raise self.error(unknown[0], "is not known here; leave it out")

    def checked_string(self, value: Any, name: str) -> str:
        """A value as a string that is valid Unicode."""
        if not isinstance(value, str):
            raise self.error(name, "must be a string")
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self.error(name, "holds half a surrogate pair, which is no character") from None
        return value

    def checked_ids(self, value: Any, name: str, most: int) -> list[int]:
        """A value as a list of at most so many int32 numbers that are not negative."""
        if isinstance(value, list) and len(value) > most:
            raise self.error(name, f"has {len(value)} entries; at most {most}")
        if not isinstance(value, list) or not all(type(one) is int and 0 <= one <= INT32_MAX for one in value):
            raise self.error(name, f"must be a list of whole numbers in [0, {INT32_MAX}]")
        return value

    def error(self, name: str, reason: str) -> InvalidInput:
        """What to raise for a field that is at fault."""
        field = ascii(f"{self._where}{name}"[:100])[1:-1]
        return InvalidInput(f"{field} {reason}", field)
