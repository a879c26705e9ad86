"""What DNS names in the mesh file stand for: every address found is a replica of its own.

gRPC would look a name up again only when a connection is lost, and hide from us which process answers.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable, Sequence

from expertmesh.errors import SetupError
from expertmesh.telemetry.logging import event

PREFIX = "dns:///"
RETRY_S = 0.5  # while a name has never been found
LEAST_S = 0.1
LOOK_UP_TIMEOUT_S = 10.0
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


def parse_name(address: str) -> tuple[str, int] | None:
    """Name and port of `dns:///NAME:PORT`; None for an address that is no name.

    Raises:
        SetupError: It begins like one and is none.
    """
    if not address.startswith("dns:"):
        return None
    name, _, port = address.removeprefix(PREFIX).rpartition(":")
    if not address.startswith(PREFIX) or not name or "/" in name or not port.isdecimal() or int(port) > 65535:
        raise SetupError(f"{address!r} is not {PREFIX}NAME:PORT")
    return name, int(port)


async def resolve(name: str, port: int) -> list[str]:
    """The addresses of a name, as `HOST:PORT` or `[IPV6]:PORT`, in an order of their own.

    Raises:
        OSError: It is not found.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(name, port, type=socket.SOCK_STREAM, flags=socket.AI_ADDRCONFIG)
    hosts = {str(address[0]) for *_, address in found}
    return sorted(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host in hosts)


class Names:
    """Keeps up to date what the addresses of one service stand for.

    Args:
        tell: Is given the addresses whenever they may have changed.
        every_s: How often names are looked up.
        look_up: Finds the addresses of a name.
    """

    def __init__(self, tell: Callable[[list[str]], None], every_s: float = 2.0, look_up: Resolve = resolve) -> None:
        self._tell, self._every_s, self._look_up = tell, every_s, look_up
        self._listed: tuple[str, ...] = ()
        self._name2found: dict[str, tuple[str, ...]] = {}
        self._missing: set[str] = set()  # of which that has been said
        self._awake = asyncio.Event()

    @property
    def groups(self) -> list[tuple[str, ...]]:
        """For every listed address what it stands for: itself, or what was found for a name."""
        return [(one,) if parse_name(one) is None else self._name2found.get(one, ()) for one in self._listed]

    def list(self, addresses: Iterable[str]) -> None:
        """Takes the addresses over that the mesh file has."""
        self._listed = tuple(addresses)
        self._name2found = {name: found for name, found in self._name2found.items() if name in self._listed}
        self._tell_all()
        self.wake()

    def wake(self) -> None:
        """Has names looked up at once, since something has changed."""
        self._awake.set()

    async def follow(self) -> None:
        """Looks names up until it is cancelled."""
        while True:
            self._awake.clear()
            names = [one for one in self._listed if parse_name(one) is not None]
            await asyncio.gather(*map(self._find, names))
            if names:
                self._tell_all()
            await asyncio.sleep(LEAST_S)
            wait_s = self._every_s if all(self.groups) else min(RETRY_S, self._every_s)
            try:
                async with asyncio.timeout(wait_s if names else None):
                    await self._awake.wait()
            except TimeoutError:
                pass

    async def _find(self, address: str) -> None:
        """Looks one name up; what cannot be found keeps what it had, whose death its connection would tell."""
        name = parse_name(address)
        assert name is not None
        try:
            async with asyncio.timeout(LOOK_UP_TIMEOUT_S):
                found = tuple(await self._look_up(*name))
        except (OSError, UnicodeError, TimeoutError) as error:
            if address not in self._missing:
                self._missing.add(address)
                event(
                    "name_not_found", level=logging.WARNING, address=address, reason=str(error) or "it takes too long"
                )
            return
        if found and address in self._listed:
            self._missing.discard(address)
            self._name2found[address] = found

    def _tell_all(self) -> None:
        self._tell([address for group in self.groups for address in group])
