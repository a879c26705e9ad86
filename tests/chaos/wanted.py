"""What whoever runs a scenario may change of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Wanted:
    """What a caller may change.

    Attributes:
        seconds: How long faults go on; 0: as long as the scenario says.
        per_s: Requests a second, likewise.
        seed: Of faults that are drawn.
    """

    seconds: float = 0.0
    per_s: float = 0.0
    seed: int = 0
