"""What comparing both routes of a language model gave, setting by setting."""

from __future__ import annotations

from dataclasses import dataclass, field

from expertmesh.verification.traces import Difference


@dataclass
class Tally:
    """One setting.

    Attributes:
        setting: What it is called.
        compared: How many sequences or answers were compared.
        tokens: Tokens of them all together.
        differing: How many of them differ in any bit.
        bits: How many bits differ.
        largest: Largest absolute difference of a logit or log probability.
    """

    setting: str
    compared: int = 0
    tokens: int = 0
    differing: int = 0
    bits: int = 0
    largest: float = 0.0

    def add(self, tokens: int, bits: int, largest: float) -> None:
        """Counts one sequence or answer."""
        self.compared += 1
        self.tokens += tokens
        self.differing += bits > 0
        self.bits += bits
        self.largest = max(self.largest, largest)


@dataclass
class Findings:
    """Every setting.

    Attributes:
        tallies: By setting.
        inexact: How many answers of the mesh said that they are not exact.
        profiles: The numeric profiles that answers were computed on.
        first: Where the first difference that could be located lies.
        was_inspected: Whether logits could be compared, for which inspection has to be on.
    """

    tallies: dict[str, Tally] = field(default_factory=dict)
    inexact: int = 0
    profiles: set[str] = field(default_factory=set)
    first: Difference | None = None
    was_inspected: bool = True

    def tally(self, setting: str) -> Tally:
        """That of one setting, which begins at nothing."""
        return self.tallies.setdefault(setting, Tally(setting))

    @property
    def differing(self) -> int:
        """How many sequences and answers differ."""
        return sum(tally.differing for tally in self.tallies.values())

    @property
    def are_equal(self) -> bool:
        """Whether no bit differs and every answer said that it is exact."""
        return not self.differing and not self.inexact
