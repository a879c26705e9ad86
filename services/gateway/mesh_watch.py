"""The mesh file is watched, so that services and replicas come and go without a restart."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from expertmesh.errors import SetupError
from expertmesh.mesh_file import MeshFile
from expertmesh.telemetry.logging import event

from .mesh import Mesh

LOOK_EVERY_S = 0.25


class MeshWatch:
    """Follows one mesh file.

    Args:
        path: Where it is.
        known: What it said when the mesh was made of it.
        mesh: What changes with it.
    """

    def __init__(self, path: Path, known: MeshFile, mesh: Mesh) -> None:
        self._path, self._known, self._mesh = path, known, mesh
        self._seen: tuple[int, ...] | None = None

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Looks at the file again and again while the context is open."""
        task = asyncio.create_task(self._follow())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _follow(self) -> None:
        while True:
            try:
                await self.look()
            except SetupError as error:  # the old mesh goes on
                event("mesh_file_refused", level=logging.ERROR, reason=str(error))
            except Exception:
                event("internal_error", level=logging.ERROR, exc_info=True)
            await asyncio.sleep(LOOK_EVERY_S)

    async def look(self) -> None:
        """Reads the file if it has changed, and changes the mesh if that says something else than before.

        Raises:
            SetupError: It cannot be read, names another model, or leaves a stage or an expert without a service. This
                is said once for each change of the file.
        """
        seen = self._stamp()
        if seen == self._seen:
            return
        self._seen = seen
        new = MeshFile.read(self._path)
        if new == self._known:
            return
        if new.model != self._known.model:
            raise SetupError(f"the mesh file names another model, {new.model}, than this gateway serves")
        await self._mesh.apply(new)
        self._known = new
        event("mesh_changed", services=len(new.services), replicas=sum(len(one.replicas) for one in new.services))

    def _stamp(self) -> tuple[int, ...]:
        try:
            status = self._path.stat()
        except OSError:
            return ()
        return status.st_mtime_ns, status.st_ino, status.st_size
