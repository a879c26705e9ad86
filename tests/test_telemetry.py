from __future__ import annotations

import json
import logging
import re
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from expertmesh.telemetry import logging as log
from expertmesh.telemetry import metrics, tracing

ROOT = Path(__file__).resolve().parent.parent
NAMES = {
    "expertmesh_requests": "counter",
    "expertmesh_request_seconds": "histogram",
    "expertmesh_queue_seconds": "histogram",
    "expertmesh_compute_seconds": "histogram",
    "expertmesh_busy_seconds": "counter",
    "expertmesh_busy_share": "gauge",
    "expertmesh_tokens": "counter",
    "expertmesh_expert_tokens": "counter",
    "expertmesh_texts": "counter",
    "expertmesh_fallbacks": "counter",
    "expertmesh_pass_texts": "histogram",
    "expertmesh_shed": "counter",
    "expertmesh_tasks": "gauge",
    "expertmesh_kv_blocks": "gauge",
    "expertmesh_kv_sequences": "gauge",
    "expertmesh_generations": "gauge",
    "expertmesh_generated_tokens": "counter",
    "expertmesh_rebuilds": "counter",
    "expertmesh_rebuilt_rows": "counter",
    "expertmesh_first_token_seconds": "histogram",
    "expertmesh_next_token_seconds": "histogram",
    "expertmesh_under_way": "gauge",
    "expertmesh_step_rows": "histogram",
    "expertmesh_replica_events": "counter",
    "expertmesh_calls": "counter",
    "expertmesh_ejections": "counter",
    "expertmesh_replicas_live": "gauge",
}


Lines = Callable[[], list[dict[str, Any]]]


@pytest.fixture
def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[Lines]:
    """Gives what was logged to stderr; the loggers are as before afterwards."""
    root, own = logging.getLogger(), logging.getLogger("expertmesh")
    before = root.handlers[:], root.level, own.level
    yield lambda: [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    root.handlers[:], level, own_level = before
    root.setLevel(level)
    own.setLevel(own_level)


def test_an_event_is_one_json_line(lines: Lines) -> None:
    log.configure("gating", "info")
    log.event("ready", address="127.0.0.1:1", seconds=0.25, text='a "b"\nc \x00 é', path=Path("x"))
    log.event("bad", level=logging.ERROR)
    first, second = lines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", str(first.pop("time")))
    assert first == {
        "level": "info",
        "service": "gating",
        "event": "ready",
        "address": "127.0.0.1:1",
        "seconds": 0.25,
        "text": 'a "b"\nc \x00 é',
        "path": "x",
    }
    assert (second["level"], second["event"]) == ("error", "bad")


def test_the_level_is_kept(lines: Lines) -> None:
    log.configure("gating", "warning")
    log.event("quiet")
    log.event("loud", level=logging.WARNING)
    assert [line["event"] for line in lines()] == ["loud"]


def test_records_of_libraries_are_json_too(lines: Lines) -> None:
    log.configure("gating")
    logging.getLogger("some.library").warning("line\n%s", "break")
    logging.getLogger("some.library").info("not shown")
    (line,) = lines()
    assert (line["event"], line["logger"], line["message"]) == ("log", "some.library", "line\nbreak")


def test_a_traceback_stays_in_its_line(lines: Lines) -> None:
    log.configure("gating")
    try:
        raise ValueError("inner")
    except ValueError:
        log.event("internal_error", level=logging.ERROR, exc_info=True, error_id="1")
    (line,) = lines()
    assert "ValueError: inner" in str(line["traceback"])


def test_configuring_twice_does_not_double_lines(lines: Lines) -> None:
    log.configure("gating")
    log.configure("gating")
    log.event("once")
    assert len(lines()) == 1


def families() -> dict[str, str]:
    found = text_string_to_metric_families(metrics.exposition().decode())
    own = (family for family in found if family.name.startswith("expertmesh_"))
    return {family.name: family.type for family in own if not family.name.endswith("_created")}


def test_the_exposition_has_every_name_in_base_units() -> None:
    assert families() == NAMES
    assert not [name for name in families() if re.search(r"_(ms|millis|us|kb|mb|minutes|percent)(_|$)", name)]


def test_what_is_counted_is_exposed() -> None:
    metrics.EXPERT_TOKENS.labels(1, 97).inc(3)
    metrics.COMPUTE_SECONDS.labels("telemetry-test").observe(0.002)
    text = metrics.exposition().decode()
    assert 'expertmesh_expert_tokens_total{expert="97",layer="1"} 3.0' in text
    assert 'expertmesh_compute_seconds_sum{stage="telemetry-test"} 0.002' in text
    assert 'expertmesh_compute_seconds_bucket{le="0.001",stage="telemetry-test"} 0.0' in text
    assert 'expertmesh_compute_seconds_bucket{le="0.0025",stage="telemetry-test"} 1.0' in text


def test_metrics_are_served_over_http_and_no_longer_afterwards() -> None:
    with metrics.MetricsServer("127.0.0.1", 0) as server:
        counter = metrics.TEXTS.labels("ledger-test")
        metrics.LEDGER.enter(counter.inc)
        wanted = f"http://127.0.0.1:{server.port}/metrics?name[]=expertmesh_texts_total"
        with urllib.request.urlopen(wanted, timeout=10) as answer:
            told = answer.read().decode()
            assert 'expertmesh_texts_total{route="ledger-test"} 1.0' in told
            assert "expertmesh_tasks" not in told
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain")
            assert b"# HELP expertmesh_texts_total" in answer.read()
        with pytest.raises(OSError, match="in use"):
            metrics.MetricsServer("127.0.0.1", server.port)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{server.port}/metrics", timeout=10)


@pytest.mark.parametrize("name", ["OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"])
def test_tracing_is_switched_on_by_an_endpoint(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    assert not tracing.is_configured()
    monkeypatch.setenv(name, "")
    assert not tracing.is_configured()
    monkeypatch.setenv(name, "http://127.0.0.1:4317")
    assert tracing.is_configured()


def test_without_an_endpoint_tracing_does_nothing() -> None:
    assert tracing.start("gating") is tracing.OFF
    assert tracing.current() is None
    with tracing.span("pass", [None], texts=1):
        pass
    tracing.OFF.shutdown()


def imported(statement: str) -> set[str]:
    """The top-level modules that a fresh process has after a statement, tracing being off."""
    script = f"import sys\n{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return set(ended.stdout.split())


@pytest.mark.parametrize("program", ["gateway", "tokenizer"])
def test_programs_without_weights_import_no_torch(program: str) -> None:
    start = "from expertmesh.telemetry import tracing; tracing.start('x'); tracing.current()"
    modules = imported(f"import services.{program}.__main__; {start}")
    assert {"grpc", "numpy", "expertmesh", "services"} <= modules
    assert not modules & {"torch", "opentelemetry", "safetensors", "sklearn", "pandas", "scipy"}


def test_a_program_with_weights_imports_no_opentelemetry_but_torch() -> None:
    modules = imported("import services.expert.__main__; from expertmesh.telemetry import tracing; tracing.start('x')")
    assert "torch" in modules
    assert not modules & {"opentelemetry", "uvicorn", "starlette", "sentencepiece"}
