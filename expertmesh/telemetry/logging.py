"""Structured log: one JSON object a line on stderr, one line an event."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any, TextIO

_LOGGER = logging.getLogger("expertmesh")
_ENCODER = json.JSONEncoder(default=str)


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object; records of other libraries become events named `log`."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self.service = service

    def format(self, record: logging.LogRecord) -> str:
        """Gives one line without its newline."""
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": stamp, "level": record.levelname.lower(), "service": self.service}
        fields = getattr(record, "fields", None)
        if fields is None:
            line |= {"event": "log", "logger": record.name, "message": record.getMessage()}
        else:
            line |= {"event": record.getMessage(), **fields}
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return _ENCODER.encode(line)


class _Handler(logging.StreamHandler[TextIO]):
    """Writes records; one that finds no room, as on a full disk, is lost without a word."""

    def handleError(self, record: logging.LogRecord) -> None:
        """Says what went wrong with a record, unless it was the stream itself."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def configure(service: str, level: str = "info") -> None:
    """Sends every record of this process to stderr as JSON."""
    handler = _Handler(sys.stderr)
    handler.setFormatter(JsonFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    _LOGGER.setLevel(level.upper())


def is_logged(level: int) -> bool:
    """Whether events of a level are written at all; for those that cost something to put together."""
    return _LOGGER.isEnabledFor(level)


def event(name: str, *, level: int = logging.INFO, exc_info: bool | Exception = False, **fields: Any) -> None:
    """Logs one event with its fields."""
    if not _LOGGER.isEnabledFor(level):
        return
    told: Any = sys.exc_info() if exc_info is True else exc_info or None
    if isinstance(told, BaseException):
        told = (type(told), told, told.__traceback__)
    record = logging.LogRecord(_LOGGER.name, level, "", 0, name, None, told)  # from where it is logged is not told
    record.fields = fields
    _LOGGER.handle(record)
