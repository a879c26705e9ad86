"""Messages to the one text that a model was trained to go on from, by the chat template of its checkpoint."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import expertmesh
from expertmesh.errors import InvalidInput, Overloaded, Unavailable

MAX_MESSAGES = 1024
MAX_MESSAGES_BYTES = 2**20
MAX_WAITING = 64
MAX_REPLY_BYTES = 16 * 2**20
START_TIMEOUT_S = 10.0
REPLY_TIMEOUT_S = 4.0

_PACKAGES = str(Path(expertmesh.__file__).parents[1])
_LOST = (OSError, EOFError, ValueError, TimeoutError)

Messages = Sequence[tuple[str, str]]


class ChatTemplate:
    """Renders a template in a process of its own, which is started when first needed and kept.

    That process limits its own time and memory; here is only what is left to do when it ends: say so, and start
    another for the next call. Messages are rendered one call at a time. Leave the object's `async with`, or call
    `close`, to end the process; it also ends with this one.

    Args:
        source: The template.
        special_texts: What it may name: `bos_token` and the like.
    """

    def __init__(self, source: str, special_texts: Mapping[str, str]) -> None:
        self._start_frame = _frame({"template": source, "variables": dict(special_texts)})
        self._process: asyncio.subprocess.Process | None = None
        self._lock = asyncio.Lock()
        self._waiting = 0

    async def __aenter__(self) -> ChatTemplate:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the process, if there is one; the next call would start another."""
        process, self._process = self._process, None
        if process is not None:
            await _end(process)

    async def render(self, messages: Messages) -> str:
        """Gives the text up to where the assistant's answer begins.

        Args:
            messages: Pairs of role and content.

        Raises:
            InvalidInput: There are no messages, too many or too long ones; or the template refuses them, fails, or
                takes too much time or memory (field `messages`).
            Overloaded: Too many calls are waiting already.
        """
        _check(messages)
        if self._waiting >= MAX_WAITING:
            raise Overloaded(f"{MAX_WAITING} chats are waiting for the template")
        self._waiting += 1
        try:
            async with self._lock:
                reply = await self._exchange(_frame([list(message) for message in messages]))
        finally:
            self._waiting -= 1
        if "text" in reply:
            return str(reply["text"])
        if "refusal" in reply:
            raise InvalidInput(f"the model's chat template refuses the messages: {reply['refusal']}", "messages")
        raise InvalidInput(f"the model's chat template fails on the messages: {reply['failure']}", "messages")

    async def _exchange(self, frame: bytes) -> dict[str, Any]:
        """Gives the process's answer. One that did not answer in time and in full is ended, whatever the reason."""
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            process = await _start(self._start_frame)
        try:
            reply = await _call(process, frame, REPLY_TIMEOUT_S)
            self._process = process
        except _LOST:
            return {"failure": "it takes too much time or memory"}
        finally:
            if self._process is None:
                await _end(process)
        return reply


async def _start(frame: bytes) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "expertmesh.tokenization.template_process"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env={**_inherited(), "PYTHONPATH": _PACKAGES},
    )
    is_ready = False
    try:
        is_ready = "ready" in await _call(process, frame, START_TIMEOUT_S)
    except _LOST:
        raise Unavailable("the process that renders chat templates does not start", "tokenizer") from None
    finally:
        if not is_ready:
            await _end(process)
    return process


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.kill()
    await process.wait()


async def _call(process: asyncio.subprocess.Process, frame: bytes, timeout_s: float) -> dict[str, Any]:
    """Sends a frame and gives the one that comes back."""
    assert process.stdin is not None
    assert process.stdout is not None
    async with asyncio.timeout(timeout_s):
        process.stdin.write(frame)
        await process.stdin.drain()
        size = int.from_bytes(await process.stdout.readexactly(4), "big")
        if size > MAX_REPLY_BYTES:
            raise ValueError("the reply is too long")
        reply = json.loads(await process.stdout.readexactly(size))
    if not isinstance(reply, dict):
        raise ValueError("the reply is no table")
    return reply


def _frame(value: Any) -> bytes:
    body = json.dumps(value).encode()
    return len(body).to_bytes(4, "big") + body


def _inherited() -> dict[str, str]:
    """Of this process's environment only what clocks and loaders need; a template could not read more anyway."""
    return {name: os.environ[name] for name in ("TZ", "LD_LIBRARY_PATH", "PATH") if name in os.environ}


def _check(messages: Messages) -> None:
    if not messages:
        raise InvalidInput("there are no messages: give at least one", "messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidInput(f"{len(messages)} messages; at most {MAX_MESSAGES}", "messages")
    size_bytes = sum(len(part.encode("utf-8", "surrogatepass")) for message in messages for part in message)
    if size_bytes > MAX_MESSAGES_BYTES:
        raise InvalidInput(f"the messages have {size_bytes} bytes; at most {MAX_MESSAGES_BYTES}", "messages")
