"""An embedding whose rows are not finite."""

from __future__ import annotations

from tests.doubles.honest import Honest


class Corrupt(Honest):
    def __init__(self) -> None:
        super().__init__(number=float("nan"))
