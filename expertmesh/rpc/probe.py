"""Asks a program for its health: `python -P -m expertmesh.rpc.probe ADDRESS`. Exits with 0 if it is SERVING.

For container health checks, which run it every few seconds: it imports gRPC's client and nothing of the mesh.
"""

from __future__ import annotations

import sys

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

TIMEOUT_S = 3.0
EXIT_USAGE = 2


def health(address: str, timeout_s: float = TIMEOUT_S) -> str:
    """The health of the program at a gRPC address: SERVING, NOT_SERVING, or the gRPC status if it did not answer."""
    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            reply = HealthStub(channel).Check(HealthCheckRequest(), timeout=timeout_s)
        except grpc.RpcError as error:
            return str(error.code().name)
    return str(HealthCheckResponse.ServingStatus.Name(reply.status))


def main(arguments: list[str]) -> int:
    """Prints the health; gives the exit status: 0 if it is SERVING, 1 if not, 2 if the arguments are wrong."""
    if len(arguments) != 1:
        print("usage: python -P -m expertmesh.rpc.probe ADDRESS", file=sys.stderr)
        return EXIT_USAGE
    found = health(arguments[0])
    print(found)
    return 0 if found == "SERVING" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
