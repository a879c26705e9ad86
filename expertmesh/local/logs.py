"""Log files of processes: their last words, and a bound on their size."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

LOG_MOST_BYTES = 16 * 2**20  # and as much again in the file of what was before
LOOK_EVERY_S = 5.0
LAST_WORDS_BYTES = 8192
BEFORE = ".before"


async def keep_bounded(logs: Callable[[], Iterable[Path]]) -> None:
    """Keeps log files from growing without end, for ever.

    Args:
        logs: Gives the files that there are now.
    """
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        for log in list(logs()):
            with suppress(OSError):
                if log.stat().st_size > LOG_MOST_BYTES:
                    await asyncio.to_thread(begin_anew, log)


def begin_anew(log: Path) -> None:
    """Empties a log that somebody writes to; what it held is kept beside it, if the disk has room.

    Whoever writes does so at the end of the file, wherever that is, and need not be told. A line that is written in
    the moment between is lost.
    """
    before = Path(f"{log}{BEFORE}")
    try:
        shutil.copyfile(log, before)
    except OSError:
        before.unlink(missing_ok=True)
    os.truncate(log, 0)


def remove(log: Path) -> None:
    """Removes a log and what was before it."""
    log.unlink(missing_ok=True)
    Path(f"{log}{BEFORE}").unlink(missing_ok=True)


def last_words(log: Path) -> str:
    """The reason in a log's last line, for people."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LAST_WORDS_BYTES))
            lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    except OSError:
        lines = []
    if not lines:
        return "it said nothing"
    try:
        return str(json.loads(lines[-1])["reason"])
    except (ValueError, KeyError, TypeError):
        return lines[-1].removeprefix("error: ")
