"""The socket at which a running mesh is told to change: `control.sock` in its folder, for its owner only.

A request is one line of JSON: `{"do": "scale", "counts": {"expert-3": 2}}` or `{"do": "restart", "names": ["gating"]}`,
where no names stand for every service. Replies are lines, too: `{"said": TEXT}` as often as something has been done,
and at the end `{"error": TEXT}`, which is empty if all went well. This is between programs of one version, no contract.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from expertmesh.errors import SetupError
from expertmesh.local import state
from expertmesh.local.rolling import Rolling

CONTROL_SOCKET = "control.sock"
MOST_REQUEST_BYTES = 2**16


class _Control:
    """Serves one request at a time; a second one meanwhile is refused."""

    def __init__(self, rolling: Rolling) -> None:
        self._rolling = rolling
        self._under_way = ""
        self._tasks: set[asyncio.Task[None]] = set()

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        def reply(**line: str) -> None:
            if not writer.is_closing():
                writer.write(json.dumps(line).encode() + b"\n")

        error = "the mesh is being stopped"
        try:
            await self._obey(await _request(reader), lambda: not reader.at_eof(), lambda text: reply(said=text))
            error = ""
        except SetupError as refused:
            error = str(refused)
        finally:
            reply(error=error)
            writer.close()

    async def _obey(self, request: dict[str, Any], is_wanted: Any, tell: Any) -> None:
        if self._under_way:
            raise SetupError(f"`expertmesh {self._under_way}` is under way: try again when it has ended")
        match request:
            case {"do": "scale", "counts": dict(counts)} if all(isinstance(one, int) for one in counts.values()):
                work = self._rolling.scale(counts, tell)
            case {"do": "restart", "names": list(names)} if all(isinstance(one, str) for one in names):
                work = self._rolling.restart(names, is_wanted, tell)
            case _:
                raise SetupError("the running mesh does not understand this; is it of another version?")
        self._under_way = request["do"]
        try:
            await work
        finally:
            self._under_way = ""


async def _request(reader: asyncio.StreamReader) -> dict[str, Any]:
    try:
        request = json.loads(await reader.readline())
    except ValueError:
        request = None
    return request if isinstance(request, dict) else {}


@asynccontextmanager
async def listening(rolling: Rolling, folder: Path) -> AsyncIterator[None]:
    """Takes requests while the context is open.

    Raises:
        SetupError: It cannot be listened at the socket.
    """
    path = folder / CONTROL_SOCKET
    control = _Control(rolling)
    path.unlink(missing_ok=True)
    try:
        server = await asyncio.start_unix_server(control.accept, path, limit=MOST_REQUEST_BYTES)
        path.chmod(0o600)
    except OSError as error:
        raise SetupError(f"cannot listen on {path}: {error.strerror}") from None
    try:
        yield
    finally:
        server.close()
        await control.stop()
        path.unlink(missing_ok=True)


async def ask(folder: Path, request: dict[str, Any]) -> AsyncGenerator[str, None]:
    """Has a running mesh do something; gives what it says has been done.

    Raises:
        SetupError: No mesh runs there, or it could not do it.
    """
    if state.find(folder) is None:
        if state.is_held(folder):
            raise SetupError(f"the mesh in {folder} is not ready yet")
        raise SetupError(f"no mesh runs in {folder}; start one with `expertmesh up`")
    try:
        reader, writer = await asyncio.open_unix_connection(folder / CONTROL_SOCKET)
    except OSError as error:
        raise SetupError(f"the mesh in {folder} does not answer: {error.strerror}") from None
    try:
        writer.write(json.dumps(request).encode() + b"\n")
        async for line in reader:
            reply = json.loads(line)
            if "error" in reply:
                if reply["error"]:
                    raise SetupError(reply["error"])
                return
            yield reply["said"]
    except ConnectionError:
        pass
    finally:
        writer.close()
        with suppress(ConnectionError):
            await writer.wait_closed()
    raise SetupError(f"the mesh in {folder} ended meanwhile")
