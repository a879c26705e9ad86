"""OpenTelemetry traces over every hop, when an OTLP endpoint is configured; otherwise nothing is even imported.

The endpoint, headers and sampling are OpenTelemetry's own environment variables, first of all
`OTEL_EXPORTER_OTLP_ENDPOINT`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


def is_configured() -> bool:
    """Whether an OTLP endpoint is named in the environment."""
    return any(os.environ.get(name) for name in _ENDPOINTS)


_is_on = functools.cache(is_configured)  # looked up for every piece of work; it does not change once a program runs


@dataclass(frozen=True)
class Tracing:
    """The interceptors that carry trace context, and how to end tracing; all empty when it is off."""

    server_interceptors: Sequence[Any] = ()
    client_interceptors: Sequence[Any] = ()
    shutdown: Callable[[], None] = field(default=lambda: None)
    is_on: bool = False

    @contextmanager
    def client_span(self, method: str) -> Iterator[Mapping[str, str]]:
        """The span of a call that goes out without gRPC's interceptors; gives the trace context to send along."""
        if not self.is_on:
            yield {}
            return
        from opentelemetry import propagate, trace

        carrier: dict[str, str] = {}
        with trace.get_tracer("expertmesh").start_as_current_span(method, kind=trace.SpanKind.CLIENT):
            propagate.inject(carrier)
            yield carrier

    @contextmanager
    def server_span(self, method: str, carrier: Mapping[str, str]) -> Iterator[None]:
        """The span of a call that came in so."""
        if not self.is_on:
            yield
            return
        from opentelemetry import propagate, trace

        parent = propagate.extract(dict(carrier))
        with trace.get_tracer("expertmesh").start_as_current_span(method, parent, kind=trace.SpanKind.SERVER):
            yield


OFF = Tracing()


def start(service: str) -> Tracing:
    """Sets up tracing of this process if it is configured."""
    if not is_configured():
        return OFF
    from opentelemetry import trace
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.grpc import aio_client_interceptors, aio_server_interceptor, filters
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    provider = TracerProvider(resource=Resource.create({"service.name": f"expertmesh.{service}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    wanted = filters.negate(
        filters.any_of(
            filters.health_check(),
            filters.full_method_name("/expertmesh.v1.DescriptionService/Describe"),
            filters.full_method_name("/expertmesh.v1.LinkService/Link"),
        )
    )
    return Tracing(
        server_interceptors=[aio_server_interceptor(filter_=wanted)],
        client_interceptors=aio_client_interceptors(filter_=wanted),
        shutdown=provider.shutdown,
        is_on=True,
    )


@contextmanager
def span(name: str, links: Sequence[Any] = (), **attributes: Any) -> Iterator[None]:
    """A span around a piece of work, a child of the current one."""
    if not _is_on():
        yield
        return
    from opentelemetry import trace

    tracer = trace.get_tracer("expertmesh")
    linked = [trace.Link(context) for context in links if context is not None]
    with tracer.start_as_current_span(name, links=linked, attributes=attributes):
        yield


@contextmanager
def http_span(name: str, headers: Mapping[str, str]) -> Iterator[None]:
    """The span of an HTTP request, a child of what its `traceparent` header names."""
    if not _is_on():
        yield
        return
    from opentelemetry import propagate, trace

    tracer = trace.get_tracer("expertmesh")
    parent = propagate.extract(dict(headers))
    with tracer.start_as_current_span(name, parent, kind=trace.SpanKind.SERVER):
        yield


def current() -> Any:
    """The current span's context, for a link from other work; None when tracing is off."""
    if not _is_on():
        return None
    from opentelemetry import trace

    return trace.get_current_span().get_span_context()
