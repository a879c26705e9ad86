"""What is to be counted, taken down first and posted later, many entries at once.

A call on a core that many processes share finds little of its code in the caches, so that each metric it touches costs
a multiple of what it costs in a row with others. An entry is one `append`; whoever looks at the metrics sees all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any

from prometheus_client import Metric
from prometheus_client.registry import Collector, CollectorRegistry

MOST_ENTRIES = 512  # posted at the latest when there are so many


class Ledger(Collector):
    """Functions that are to be called, and with what.

    Args:
        registry: Before its metrics are collected, everything is posted; those that the entries are about must be
            registered after this was made.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        self._entries: deque[tuple[Callable[..., object], tuple[Any, ...]]] = deque()
        self._lock = Lock()
        registry.register(self)

    def enter(self, post: Callable[..., object], *amounts: Any) -> None:
        """Has a function called later, once; it must not fail."""
        self._entries.append((post, amounts))
        if len(self._entries) >= MOST_ENTRIES:
            self.post()

    def post(self) -> None:
        """Calls all of them, in their order."""
        with self._lock:  # whoever collects does so in a thread
            while self._entries:
                post, amounts = self._entries.popleft()
                post(*amounts)

    def describe(self) -> Iterable[Metric]:
        """As a collector has it: there are no metrics of its own."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """Sees to it that nothing is missing from the metrics that are collected next."""
        self.post()
        return ()
