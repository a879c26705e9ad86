"""Asks a program for its health: `python -P -m expertmesh.rpc.probe HOST:PORT`. Exits with 0 if it is SERVING.

Container health checks run it every few seconds in every container, so it must cost nothing: it imports no gRPC, which
takes six times as long to start as the whole probe, but writes the one call of `grpc.health.v1.Health/Check` by hand
(RFC 9113 for frames, RFC 7541 for headers). It follows no redirects, windows or settings; no other call would work.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterator

TIMEOUT_S = 5.0
EXIT_USAGE = 2

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS = 1, 4
_EMPTY_MESSAGE = bytes(5)  # not compressed, length 0: HealthCheckRequest for the whole program
_STATUS = {b"\0\0\0\0\x02\x08\x01": "SERVING", b"\0\0\0\0\x02\x08\x02": "NOT_SERVING"}


def health(host: str, port: int, timeout_s: float = TIMEOUT_S) -> str:
    """The health of a program: SERVING, NOT_SERVING or UNKNOWN.

    Raises:
        OSError: Nobody listens, or there was no answer in time.
    """
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": "/grpc.health.v1.Health/Check",
        ":authority": "probe",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    call = _frame(_HEADERS, _END_HEADERS, 1, b"".join(_literal(*header) for header in headers.items()))
    with socket.create_connection((host, port), timeout_s) as connection:
        connection.sendall(_PREFACE + _frame(_SETTINGS, 0, 0) + call + _frame(_DATA, _END_STREAM, 1, _EMPTY_MESSAGE))
        reply = b"".join(_reply(connection))
    return _STATUS.get(reply, "UNKNOWN")


def _reply(connection: socket.socket) -> Iterator[bytes]:
    """The data of stream 1 until that or the connection ends."""
    with connection.makefile("rb") as stream:
        while len(head := stream.read(9)) == 9:
            length, kind, flags, number = int.from_bytes(head[:3]), *struct.unpack(">BBI", head[3:])
            payload = stream.read(length)
            if number == 1 and kind == _DATA:
                yield payload
            if number == 1 and kind in (_DATA, _HEADERS) and flags & _END_STREAM:
                return


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3) + struct.pack(">BBI", kind, flags, stream) + payload


def _literal(name: str, value: str) -> bytes:
    """A header that goes into no table, without Huffman coding; both parts have less than 127 bytes."""
    return b"".join((b"\0", bytes([len(name)]), name.encode(), bytes([len(value)]), value.encode()))


def main(arguments: list[str]) -> int:
    """Prints the health; gives the exit status: 0 if it is SERVING, 1 if not, 2 if the arguments are wrong."""
    host, _, port = arguments[0].rpartition(":") if len(arguments) == 1 else ("", "", "")
    if not host or not port.isdecimal():
        print("usage: python -P -m expertmesh.rpc.probe HOST:PORT", file=sys.stderr)
        return EXIT_USAGE
    try:
        found = health(host.strip("[]"), int(port))
    except OSError as error:
        found = f"no answer: {error}"
    print(found)
    return 0 if found == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
