from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as otlp_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from expertmesh.client import Client
from tests.up import Up


class Collector(otlp_grpc.TraceServiceServicer):
    """Receives spans over OTLP as any backend would."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        self.changed = threading.Condition()

    def Export(self, request: otlp.ExportTraceServiceRequest, context: object) -> otlp.ExportTraceServiceResponse:
        with self.changed:
            for resource in request.resource_spans:
                attributes = {attribute.key: attribute.value.string_value for attribute in resource.resource.attributes}
                for scope in resource.scope_spans:
                    self.spans.extend((attributes["service.name"], span) for span in scope.spans)
            self.changed.notify_all()
        return otlp.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    collector = Collector()
    server = grpc.server(futures.ThreadPoolExecutor(2))
    otlp_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, f"http://127.0.0.1:{port}"
    server.stop(None)


async def test_one_request_is_one_tree_with_every_stage_and_expert_call(
    model: Path, collector: tuple[Collector, str]
) -> None:
    received, endpoint = collector
    environment = {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "200"}
    with Up(model, "--no-full-model", environment=environment) as up:
        async with Client(up.grpc) as client:
            reply = await client.classify(["Striker scores twice as cup holders win at home in the rain"],
                                          include_experts=True)  # fmt: skip
    # `up` has stopped: every program has sent what it had.
    counts = memoryview(reply.results[0].expert_tokens.data).cast("i").tolist()
    spans = [(service, span) for service, span in received.spans if "Describe" not in span.name]
    by_id = {span.span_id: (service, span) for service, span in spans}
    roots = [span for _, span in spans if span.parent_span_id not in by_id]
    assert len({span.trace_id for _, span in spans}) == 1
    assert [(by_id[root.span_id][0], root.name) for root in roots] == [
        ("expertmesh.gateway", "/expertmesh.v1.InferenceService/Classify")
    ]
    served = Counter(service for service, span in spans if span.kind == Span.SPAN_KIND_SERVER)
    assert served == {
        "expertmesh.gateway": 1,
        "expertmesh.tokenizer": 1,
        "expertmesh.embedding": 1,
        "expertmesh.gating": 2,
        "expertmesh.expert": sum(count > 0 for count in counts),
        "expertmesh.classifier": 1,
    }
    assert "pass" in {span.name for service, span in spans if service == "expertmesh.gateway"}
