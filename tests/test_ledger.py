from __future__ import annotations

from threading import Thread

from prometheus_client import CollectorRegistry, Counter, Histogram

from expertmesh.telemetry import ledger
from expertmesh.telemetry.ledger import Ledger


def test_whoever_looks_at_the_metrics_sees_all_that_was_entered() -> None:
    registry = CollectorRegistry()
    book = Ledger(registry)
    counter = Counter("calls", "Calls.", registry=registry)
    seconds = Histogram("took", "What they took.", registry=registry, buckets=(1, 2))
    for took_s in (0.5, 1.5, 3.0):
        book.enter(counter.inc)
        book.enter(seconds.observe, took_s)
    assert registry.get_sample_value("calls_total") == 3
    assert registry.get_sample_value("took_sum") == 5.0
    assert registry.get_sample_value("took_bucket", {"le": "2.0"}) == 2
    assert registry.get_sample_value("calls_total") == 3  # and nothing is posted twice


def test_entries_are_posted_in_their_order_and_do_not_pile_up() -> None:
    book = Ledger(CollectorRegistry())
    posted: list[int] = []
    for number in range(ledger.MOST_ENTRIES + 10):
        book.enter(posted.append, number)
    assert posted == list(range(ledger.MOST_ENTRIES))
    book.post()
    assert posted == list(range(ledger.MOST_ENTRIES + 10))


def test_threads_that_enter_and_post_at_once_lose_nothing() -> None:
    book = Ledger(CollectorRegistry())
    posted: list[int] = []
    threads = [
        Thread(target=lambda: [book.enter(posted.append, number) for number in range(5000)]),
        Thread(target=lambda: [book.post() for _ in range(5000)]),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    book.post()
    assert posted == list(range(5000))
