"""A channel to several gateways of one mesh, of which a caller needs only one that lives.

Calls go round those that say SERVING; one that ends before it had a reply is made again at another. A hung gateway is
found by keepalive, which ends its calls. What gRPC calls hedging it does not do in Python, and neither does this.
"""

from __future__ import annotations

import ipaddress
import json
from collections.abc import Sequence

import grpc.aio

from expertmesh.errors import SetupError
from expertmesh.rpc.channel import CLIENT_OPTIONS, message_limits, open_channel
from expertmesh.rpc.settings import parse_host_port

SERVICE_CONFIG = json.dumps(
    {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": ""},
        "methodConfig": [
            {
                "name": [{}],
                "retryPolicy": {
                    "maxAttempts": 4,
                    "initialBackoff": "0.05s",
                    "maxBackoff": "0.5s",
                    "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],  # the second when a server stops
                },
            }
        ],
        # The death of a gateway fails many calls at once, which are all made again; after that, one in ten.
        "retryThrottling": {"maxTokens": 1000, "tokenRatio": 0.1},
    }
)


def open_gateways(addresses: Sequence[str], max_message_bytes: int = 64 * 2**20) -> grpc.aio.Channel:
    """A channel to gateways; it connects when it is first used.

    Args:
        addresses: One gRPC address of any kind, or several as `IP:PORT`.
        max_message_bytes: Largest message accepted.

    Raises:
        SetupError: Several are given, and one is no such address.
    """
    if not are_several(addresses):
        return open_channel(addresses[0], max_message_bytes)
    options = [option for option in CLIENT_OPTIONS if option[0] != "grpc.service_config"]
    return grpc.aio.insecure_channel(
        _target(addresses),
        options=(*options, ("grpc.service_config", SERVICE_CONFIG), *message_limits(max_message_bytes)),
    )


def are_several(addresses: Sequence[str]) -> bool:
    """Whether addresses stand for more than one gateway, as the name of one that DNS resolves may."""
    return len(addresses) > 1 or addresses[0].startswith("dns:")


def _target(addresses: Sequence[str]) -> str:
    """What gRPC's resolver takes several addresses by."""
    if len(addresses) == 1:
        return addresses[0]
    versions = {_version(address) for address in addresses}
    if len(versions) > 1:
        raise SetupError("several gateways must be given by addresses of one kind, IPv4 or IPv6")
    named = ",".join(address.replace("localhost:", "127.0.0.1:") for address in addresses)
    return f"ipv{versions.pop()}:{named}"


def _version(address: str) -> int:
    host, _ = parse_host_port(address, "address")
    try:
        return 4 if host == "localhost" else ipaddress.ip_address(host).version
    except ValueError:
        raise SetupError(
            f"{address!r}: of several gateways each must be given as IP:PORT; one name may stand for all: dns:///NAME:PORT"
        ) from None
