"""What both ends of a link say to whatever carries their frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

OnFrame = Callable[[Any, "bytes | memoryview"], None]
OnEnd = Callable[[], None]


class Heads(Protocol):
    """The class of what stands in front of messages: `LinkRequest` or `LinkResponse`."""

    @staticmethod
    def FromString(data: Any, /) -> Any:
        """Parses one."""


class Connection(Protocol):
    """Carries frames in both directions."""

    def send(self, head: Any, message: bytes) -> None:
        """Sends a frame; never waits."""

    def finish(self) -> None:
        """Sends no more; the other side reads what has been sent, and then ends the connection."""

    def close(self) -> None:
        """Ends the connection."""
