"""How many sequences a home has room for, as far as can be told: its cache may hold fewer than it may run."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

RETRY_OPEN_S = 0.05


class Room:
    """What one home takes.

    Args:
        most: Sequences that it may run.
        load: Tells how many it runs.
        changed: Is called when there may be room again.

    Attributes:
        is_full: Whether nothing is to be opened until something was released, or a while has passed, since another
            program may have released something.
    """

    def __init__(self, most: int, load: Callable[[], int], changed: Callable[[], None]) -> None:
        self._load, self._changed = load, changed
        self._fits = most
        self._retry: asyncio.TimerHandle | None = None
        self.is_full = False

    @property
    def left(self) -> int:
        """How many more there is probably room for."""
        return max(0, self._fits - self._load())

    def taken(self) -> None:
        """One was opened."""
        self._fits = max(self._fits, self._load())

    def refused(self) -> None:
        """There was none for another one."""
        self.is_full = True
        self._fits = self._load()
        self._retry = asyncio.get_running_loop().call_later(RETRY_OPEN_S, self._look_again)

    def released(self) -> None:
        """Something was given back."""
        if self._retry is not None:
            self._retry.cancel()
            self._look_again()

    def _look_again(self) -> None:
        self.is_full = False
        self._fits = max(self._fits, self._load() + 1)  # one is tried
        self._retry = None
        self._changed()
