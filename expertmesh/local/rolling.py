"""Changes of a running mesh that lose nothing: more or fewer replicas, and new processes in place of old ones.

What is new is started first and is healthy before the gateways hear of it through the mesh file; what is old ends after
they have let go of it. If something new does not become healthy, nothing has changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from expertmesh.errors import SetupError
from expertmesh.local.plan import Process, check_count
from expertmesh.local.supervisor import Supervisor
from expertmesh.mesh_file import MeshFile, Service

Tell = Callable[[str], None]


class Rolling:
    """Scales and restarts services of a running mesh, one change at a time.

    Args:
        supervisor: Of that mesh.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._service2number = {service.name: len(service.replicas) for service in supervisor.mesh_file.services}

    async def scale(self, counts: Mapping[str, int], tell: Tell) -> None:
        """Gives services as many replicas as are asked for.

        Args:
            counts: Replicas by service name or kind; a name goes before its kind.
            tell: Is told what has been done.

        Raises:
            SetupError: A service is not known, cannot have so many, or a new replica did not become healthy. Then
                nothing has changed.
        """
        before = self._supervisor.mesh_file
        known = {name for service in before.services for name in (service.name, service.kind)}
        for name in counts:
            if name not in known:
                raise self._unknown(name)
        wanted = {
            service: counts.get(service.name, counts.get(service.kind, len(service.replicas)))
            for service in before.services
        }
        for service, count in wanted.items():
            check_count(service.name, count)
        added: list[Process] = []
        after = [self._resized(service, count, added) for service, count in wanted.items()]
        staying = {address for service in after for address in service.replicas}
        removed = [
            self._supervisor.process_at(address)
            for service in before.services
            for address in service.replicas
            if address not in staying
        ]
        if not added and not removed:
            tell("nothing to do: the mesh is so already")
            return
        await self._swap(replace(before, services=tuple(after)), added, removed, tell)

    async def restart(self, names: Sequence[str], is_wanted: Callable[[], bool], tell: Tell) -> None:
        """Puts new processes in place of running ones, one after another.

        Args:
            names: Services, kinds, or single replicas as `expert-3.0`; none: every service, in the order of a request.
            is_wanted: Is asked between two processes whether to go on.
            tell: Is told what has been done.

        Raises:
            SetupError: A name is not known, or a new process did not become healthy: then the old one serves on, and
                those after it are as they were.
        """
        services = self._supervisor.mesh_file.services
        asked = [self._named(name) for name in names] if names else [self._processes(service) for service in services]
        processes = list({process.name: process for group in asked for process in group}.values())
        for done, process in enumerate(processes):
            if not is_wanted():
                raise SetupError(f"whoever asked is gone; {done} of {len(processes)} processes were restarted")
            tell(f"{done}/{len(processes)} {process.name}")
            await self._restart(process, tell)
        tell(f"{len(processes)}/{len(processes)} restarted")

    async def _restart(self, old: Process, tell: Tell) -> None:
        if old.kind == "gateway":  # its address is what clients know, and cannot be listened at twice
            await self._supervisor.replace(old)
            tell(f"{old.name} was started anew at {old.address}")
            return
        before = self._supervisor.mesh_file
        service = next(service for service in before.services if service.name == old.service)
        new = self._supervisor.plan.further(service, self._next_number(service))
        replicas = tuple(new.address if address == old.address else address for address in service.replicas)
        await self._swap(_with(before, replace(service, replicas=replicas)), [new], [old], tell)

    async def _swap(self, after: MeshFile, added: list[Process], removed: list[Process], tell: Tell) -> None:
        if added:
            await self._supervisor.add(added)
            tell(f"{_names(added)} healthy")
        try:
            self._supervisor.change(after)
        except SetupError:
            await self._supervisor.remove(added)
            raise
        if removed:
            await self._supervisor.remove(removed)
            tell(f"{_names(removed)} ended")

    def _resized(self, service: Service, count: int, added: list[Process]) -> Service:
        """A service with so many replicas; processes that this takes are appended to `added`."""
        for _ in range(count - len(service.replicas)):
            process = self._supervisor.plan.further(service, self._next_number(service))
            added.append(process)
            https = ",".join(filter(None, (service.http, process.http)))
            service = replace(service, replicas=(*service.replicas, process.address), http=https)
        https = ",".join(service.http.split(",")[:count])
        return replace(service, replicas=service.replicas[:count], http=https)

    def _next_number(self, service: Service) -> int:
        number = self._service2number[service.name]
        self._service2number[service.name] = number + 1
        return number

    def _named(self, name: str) -> list[Process]:
        """The processes that a name stands for."""
        services = self._supervisor.mesh_file.services
        named = [s for s in services if s.name == name] or [s for s in services if s.kind == name]
        found = [process for service in named for process in self._processes(service)]
        found = found or [p for service in services for p in self._processes(service) if p.name == name]
        if not found:
            raise self._unknown(name)
        return found

    def _unknown(self, name: str) -> SetupError:
        names = ", ".join(service.name for service in self._supervisor.mesh_file.services)
        return SetupError(f"this mesh has no service {name!r}; it has: {names}")

    def _processes(self, service: Service) -> list[Process]:
        return [self._supervisor.process_at(address) for address in service.replicas]


def _with(mesh_file: MeshFile, changed: Service) -> MeshFile:
    services = tuple(changed if service.name == changed.name else service for service in mesh_file.services)
    return replace(mesh_file, services=services)


def _names(processes: Sequence[Process]) -> str:
    return f"{', '.join(process.name for process in processes)} {'is' if len(processes) == 1 else 'are'}"
