"""Ports for gateways to listen on: the one that is asked for, or one that is free."""

from __future__ import annotations

import socket
from collections.abc import Iterable

from expertmesh.errors import SetupError
from expertmesh.rpc.settings import parse_host_port

HIGHEST_PORT = 65535


class Ports:
    """Finds addresses to listen on, each only once.

    Args:
        taken: Addresses that are somebody's, also while nobody listens there.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = set(taken)

    def first(self, asked: str, option: str) -> str:
        """Gives an address with the port that is asked for, or any free one for port 0.

        Raises:
            SetupError: It is in use, or is no address.
        """
        host, port = parse_host_port(asked, option)
        while True:
            try:
                found = _bound(host, port)
            except OSError as error:
                raise SetupError(
                    f"{option} {asked}: {error.strerror}; choose another, or port 0 for any free one"
                ) from None
            address = f"{asked.rpartition(':')[0]}:{found}"
            if address not in self._taken:
                self._taken.add(address)
                return address
            if port:
                raise SetupError(f"{option} {asked}: it is taken twice")

    def further(self, asked: str, option: str) -> str:
        """Gives the next free address above the one that is asked for, or any free one for port 0.

        Raises:
            SetupError: There is none.
        """
        host, port = parse_host_port(asked, option)
        if port == 0:
            return self.first(asked, option)
        for higher in range(port + 1, HIGHEST_PORT + 1):
            address = f"{asked.rpartition(':')[0]}:{higher}"
            if address in self._taken:
                continue
            try:
                _bound(host, higher)
            except OSError:
                continue
            self._taken.add(address)
            return address
        raise SetupError(f"{option} {asked}: no port above it is free")


def _bound(host: str, port: int) -> int:
    """The port that somebody who listens there gets."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
        found: int = probe.getsockname()[1]
        return found
