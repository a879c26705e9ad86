"""Prometheus metrics of every program, in base units. The registry is the only mutable state at module level."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import Thread
from wsgiref.simple_server import WSGIServer

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Metric,
    generate_latest,
    start_http_server,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import RestrictedRegistry

from expertmesh.telemetry.ledger import Ledger

CONTENT_TYPE = CONTENT_TYPE_LATEST
SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

LEDGER = Ledger(REGISTRY)  # before the metrics, so that it is asked before them

RPCS = Counter("expertmesh_requests", "Calls that ended, by gRPC method or HTTP path and status.", ["method", "code"])
RPC_SECONDS = Histogram("expertmesh_request_seconds", "From a call's arrival to its end.", ["method"], buckets=SECONDS)
QUEUE_SECONDS = Histogram(
    "expertmesh_queue_seconds", "From arrival to the start of computing.", ["stage"], buckets=SECONDS
)
COMPUTE_SECONDS = Histogram("expertmesh_compute_seconds", "Computing of one call or pass.", ["stage"], buckets=SECONDS)
BUSY_SECONDS = Counter("expertmesh_busy_seconds", "Time in which the device was at work.", ["stage"])
BUSY_SHARE = Gauge("expertmesh_busy_share", "Share of the last ten seconds in which the device was at work.", ["stage"])
TOKENS = Counter("expertmesh_tokens", "Token rows computed.", ["stage"])
EXPERT_TOKENS = Counter("expertmesh_expert_tokens", "Token rows computed by an expert.", ["layer", "expert"])
TEXTS = Counter("expertmesh_texts", "Texts answered, by the route that served them.", ["route"])
FALLBACKS = Counter(
    "expertmesh_fallbacks", "Calls that went on by another route, by the stage that did not answer.", ["stage"]
)
PASS_TEXTS = Histogram("expertmesh_pass_texts", "Texts that shared a pass.", buckets=(1, 2, 4, 8, 16, 32, 64, 128))
TASKS = Gauge("expertmesh_tasks", "Tasks of the event loop, looked at twice a second.")
KV_BLOCKS = Gauge("expertmesh_kv_blocks", "Blocks of the KV cache: total and used.", ["state"])
KV_SEQUENCES = Gauge("expertmesh_kv_sequences", "Sequences that hold blocks of the KV cache.")
GENERATIONS = Gauge(
    "expertmesh_generations",
    "Sequences that generate, by whether they wait, run, or wait to be computed anew.",
    ["state"],
)
GENERATED_TOKENS = Counter("expertmesh_generated_tokens", "Tokens generated, by the route that served them.", ["route"])
REBUILDS = Counter("expertmesh_rebuilds", "Sequences computed anew, since what was cached of them was lost.")
REBUILT_ROWS = Counter("expertmesh_rebuilt_rows", "Token rows of sequences computed anew.")
FIRST_TOKEN_SECONDS = Histogram(
    "expertmesh_first_token_seconds",
    "From a request's arrival to its first token, by the route that served it.",
    ["route"],
    buckets=SECONDS,
)
NEXT_TOKEN_SECONDS = Histogram(
    "expertmesh_next_token_seconds", "From one token to the next, by route.", ["route"], buckets=SECONDS
)
STEP_ROWS = Histogram(
    "expertmesh_step_rows", "Token rows that shared a step.", buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
)
SHED = Counter(
    "expertmesh_shed",
    "What was refused: the queue was full, the answer would have been late, or it waited too long and was dropped.",
    ["queue", "reason"],
)
UNDER_WAY = Gauge("expertmesh_under_way", "Passes and steps that are computed just now.", ["kind"])
REPLICA_EVENTS = Counter("expertmesh_replica_events", "What happened to replicas.", ["service", "what"])
CALLS = Counter(
    "expertmesh_calls",
    "Calls to services: the first for a request, one more since that failed, since it was late, or as a proof.",
    ["service", "why"],
)
EJECTIONS = Counter(
    "expertmesh_ejections", "Replicas left for being wrong, failing or slow.", ["service", "address", "why"]
)
REPLICAS_LIVE = Gauge("expertmesh_replicas_live", "Replicas that are verified and answer.", ["service"])


class Work:
    """What a device has done, as metrics.

    Args:
        stage: Whose device it is.
        clock: Tells the time, in seconds.
    """

    WINDOW_S = 10

    def __init__(self, stage: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._compute_seconds, self._busy_seconds = COMPUTE_SECONDS.labels(stage), BUSY_SECONDS.labels(stage)
        self._tokens = TOKENS.labels(stage)
        self._clock = clock
        self._second2busy_s: dict[int, float] = {}
        BUSY_SHARE.labels(stage).set_function(self.share)

    def done(self, rows: int, seconds: float) -> None:
        """Takes down a piece of work that has just ended."""
        LEDGER.enter(self._post, rows, seconds, self._clock())

    def _post(self, rows: int, seconds: float, ended_s: float) -> None:
        self._compute_seconds.observe(seconds)
        self._busy_seconds.inc(seconds)
        self._tokens.inc(rows)
        for second in range(max(int(ended_s - seconds), int(ended_s) - self.WINDOW_S), int(ended_s) + 1):
            inside_s = min(ended_s, second + 1) - max(ended_s - seconds, second)
            self._second2busy_s[second] = self._second2busy_s.get(second, 0.0) + inside_s
        if len(self._second2busy_s) > 2 * self.WINDOW_S:
            self._forget(int(ended_s))

    def share(self) -> float:
        """Share of the last whole seconds of `WINDOW_S` in which it was at work."""
        LEDGER.post()
        now = int(self._clock())
        busy_s = sum(
            busy_s for second, busy_s in list(self._second2busy_s.items()) if now - self.WINDOW_S <= second < now
        )
        return min(1.0, busy_s / self.WINDOW_S)

    def _forget(self, now: int) -> None:
        for second in [second for second in self._second2busy_s if second < now - self.WINDOW_S]:
            del self._second2busy_s[second]


def forget_service(service: str) -> None:
    """Removes what was told of a service that has left the mesh."""
    for metric in (REPLICA_EVENTS, REPLICAS_LIVE, EJECTIONS):
        metric.remove_by_labels({"service": service})


def forget_replica(service: str, address: str) -> None:
    """Removes what was told of a replica that has left."""
    EJECTIONS.remove_by_labels({"service": service, "address": address})


def exposition() -> bytes:
    """The current values in Prometheus' text format."""
    return generate_latest(REGISTRY)


class _Posted(CollectorRegistry):
    """The registry as `/metrics` asks for it: where only some names are wanted, the ledger would not be asked."""

    def collect(self) -> Iterable[Metric]:
        return REGISTRY.collect()

    def restricted_registry(self, names: Iterable[str]) -> RestrictedRegistry:
        LEDGER.post()
        return REGISTRY.restricted_registry(names)


@dataclass
class MetricsServer(AbstractContextManager["MetricsServer"]):
    """Serves `/metrics` over HTTP from a thread.

    Args:
        host: Where to listen.
        port: 0 takes a free one; `port` then tells which.

    Raises:
        OSError: The port is in use.
    """

    host: str
    port: int

    def __post_init__(self) -> None:
        self._server: WSGIServer
        self._thread: Thread
        self._server, self._thread = start_http_server(self.port, self.host, _Posted())
        self.port = self._server.server_port

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
