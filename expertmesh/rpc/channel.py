"""Channels between the programs of a mesh, and the options that make a dead peer known soon.

Options that gRPC does not know are ignored without a word; these are the ones whose effect was seen.
"""

from __future__ import annotations

import grpc.aio

from expertmesh.telemetry.tracing import OFF, Tracing

CLIENT_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.enable_http_proxy", 0),  # the mesh is never behind one, whatever the environment says
    ("grpc.keepalive_time_ms", 700),  # a process that hangs is lost within twice this; one that computes answers pings
    ("grpc.keepalive_timeout_ms", 700),
    ("grpc.http2.ping_timeout_ms", 700),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.client_idle_timeout_ms", 2**31 - 1),  # beside a unix socket's link nothing is called, which is no end
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.service_config", '{"loadBalancingConfig": [{"round_robin": {}}]}'),
)
SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.so_reuseport", 0),
    ("grpc.max_concurrent_streams", 256),
    ("grpc.server.max_pending_requests", 100_000),  # above it calls are dropped at random; we refuse by ourselves
    ("grpc.server.max_pending_requests_hard_limit", 100_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),  # less than the time between a client's pings
    ("grpc.keepalive_permit_without_calls", 1),
)


def message_limits(max_message_bytes: int) -> tuple[tuple[str, int], ...]:
    """The options that bound messages in both directions."""
    return (
        ("grpc.max_receive_message_length", max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
    )


def open_channel(address: str, max_message_bytes: int = 64 * 2**20, tracing: Tracing = OFF) -> grpc.aio.Channel:
    """A channel to a service of the mesh; it connects when it is first used."""
    return grpc.aio.insecure_channel(
        address,
        options=(*CLIENT_OPTIONS, *message_limits(max_message_bytes)),
        interceptors=list(tracing.client_interceptors) or None,
    )
