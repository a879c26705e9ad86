"""A process of its own that answers questions of a benchmark, one JSON line each way. Knows nothing but Python.

So a contender has its own threads, its own environment and, if need be, its own interpreter and packages. Between
questions it is held by SIGSTOP, with whatever it has started, so that threads that spin while they wait, and daemons
that look after each other, take nothing from the others.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MOST_BYTES = 2**26
STOP_TIMEOUT_S = 20.0
LAST_WORDS_BYTES = 2000


class Child:
    """A contender in a process of its own. Use as an async context manager.

    Args:
        module: What it runs, as `python -m`; it calls `serve`.
        arguments: Of that.
        environment: Variables beside this process's own.
        python: Its interpreter.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        environment: Mapping[str, str] | None = None,
        python: str | Path = sys.executable,
    ) -> None:
        self._command = [str(python), "-m", module, *arguments]
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), **(environment or {})}
        self._process: asyncio.subprocess.Process

    async def __aenter__(self) -> Child:
        """Starts it, and waits until it is ready.

        Raises:
            RuntimeError: It ended; tells its last words.
        """
        pipe = asyncio.subprocess.PIPE
        self._words = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=pipe,
            stdout=pipe,
            stderr=self._words,
            env=self._environment,
            cwd=ROOT,
            limit=MOST_BYTES,
        )
        await self._answer()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends it."""
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(STOP_TIMEOUT_S):
                await self._process.wait()
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await self._process.wait()
        self._words.close()

    async def ask(self, **question: Any) -> Any:
        """Gives what it answers to a question.

        Raises:
            RuntimeError: It ended; tells its last words.
        """
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(question).encode() + b"\n")
        return await self._answer()

    async def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            self._words.seek(0)
            last = self._words.read()[-LAST_WORDS_BYTES:].decode(errors="replace")
            raise RuntimeError(f"{' '.join(self._command)} ended: {last}")
        self._signal(signal.SIGSTOP)
        return json.loads(line)

    def _signal(self, number: signal.Signals) -> None:
        for pid in family(self._process.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def family(pid: int) -> list[int]:
    """A process that has not been waited for, and those that it has started, and so on."""
    parent2children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            parent2children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += parent2children.get(one, ())
    return found


def serve(answer: Callable[..., Any]) -> None:
    """Answers questions until there are no more; says once that it is ready. Whatever else prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    print(json.dumps("ready"), file=replies)
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), file=replies)
