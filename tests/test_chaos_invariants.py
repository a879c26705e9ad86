from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.invariants import HEAL_S, INVARIANTS, Evidence, judge
from tests.chaos.record import NEVER, Record
from tests.chaos.vitals import Vitals

RIGHT = [b"one", b"another", b"a third"]
HEALED_S = 100.0


def record(number: int, **fields: Any) -> Record:
    sample = number % len(RIGHT)
    start_s = HEALED_S - 50 + number
    plain: dict[str, Any] = {
        "load": 0, "number": number, "kind": "generate", "sample": sample, "contract": "EXACT", "gateway": "here",
        "due_s": start_s, "start_s": start_s, "end_s": start_s + 1, "timeout_s": 5.0, "code": "OK",
        "routes": ("MESH",), "exact": True, "answer": RIGHT[sample], "finishes": 1, "messages": 3,
    }  # fmt: skip
    return Record(**{**plain, **fields})


def vitals(**fields: Any) -> Vitals:
    return replace(Vitals(pid=1, rss_bytes=300 * 2**20, descriptors=40, tasks=20, kv_blocks=0), **fields)


def good() -> Evidence:
    records = [record(number) for number in range(100)]
    held = {"gateway.0": vitals(kv_blocks=None), "gating.0": vitals(), "gating.1": vitals()}
    return Evidence(
        100, records, {"generate": RIGHT}, HEALED_S, held, dict(held), {"first": 100.0, "retry": 15.0, "hedge": 5.0}
    )


def with_record(number: int, **fields: Any) -> Evidence:
    records = [record(n, **fields) if n == number else record(n) for n in range(100)]
    return replace(good(), records=records)


def with_after(**fields: Any) -> Evidence:
    return replace(good(), after={**good().after, "gating.1": vitals(**fields)})


def broken(evidence: Evidence) -> set[str]:
    return {finding.name for finding in judge(evidence) if not finding.holds}


LATE = int(50 + HEAL_S) + 10  # a request that was sent after healing
BROKEN: dict[str, tuple[Callable[[], Evidence], set[str]]] = {
    "one has no end": (lambda: replace(good(), records=good().records[1:]), {"each request ends once"}),
    "one ended twice": (lambda: replace(good(), records=[*good().records, record(5)]), {"each request ends once"}),
    "one is finished twice": (lambda: with_record(3, finishes=2), {"each request ends once"}),
    "one is OK and not finished": (lambda: with_record(3, finishes=0), {"each request ends once"}),
    "one never ended": (
        lambda: with_record(3, code=NEVER, answer=b"", end_s=HEALED_S),
        {"each request ends once", "within its deadline + 0.5 s", "failures are of three kinds"},
    ),
    "one is late": (lambda: with_record(3, end_s=HEALED_S - 47 + 5.6), {"within its deadline + 0.5 s"}),
    "one has other bits": (lambda: with_record(3, answer=b"two"), {"no bit is changed"}),
    "one is not whole": (lambda: with_record(3, answer=b"on"), {"no bit is changed"}),
    "one broke off after a wrong token": (
        lambda: with_record(3, code="UNAVAILABLE", answer=b"x"),
        {"no bit is changed"},
    ),
    "one is degraded and exact": (lambda: with_record(3, routes=("DEGRADED",), answer=b"x"), {"no bit is changed"}),
    "one failed otherwise": (lambda: with_record(3, code="INTERNAL", answer=b""), {"failures are of three kinds"}),
    "one failed late": (lambda: with_record(LATE, code="UNAVAILABLE", answer=b""), {"no failure 5 s after healing"}),
    "one was served by the full model late": (
        lambda: with_record(LATE, routes=("FULL_MODEL",)),
        {"MESH again 5 s after healing"},
    ),
    "one began by the mesh and went on by the full model late": (
        lambda: with_record(LATE, routes=("MESH", "FULL_MODEL")),
        {"MESH again 5 s after healing"},
    ),
    "one is degraded late": (
        lambda: with_record(LATE, routes=("DEGRADED",), exact=False),
        {"MESH again 5 s after healing"},
    ),
    "memory grew": (lambda: with_after(rss_bytes=400 * 2**20), {"memory is back"}),
    "tasks grew": (lambda: with_after(tasks=40), {"tasks are back"}),
    "descriptors grew": (lambda: with_after(descriptors=60), {"descriptors are back"}),
    "a block is held": (lambda: with_after(kv_blocks=1), {"KV blocks are back"}),
    "a service is gone": (
        lambda: replace(good(), after={"gateway.0": vitals(kv_blocks=None)}),
        {"memory is back", "tasks are back", "descriptors are back", "KV blocks are back"},
    ),
    "too many calls": (
        lambda: replace(good(), calls={"first": 100.0, "retry": 16.0, "hedge": 5.0}),
        {"expert calls within 1.2 of ideal"},
    ),
    "no calls counted": (lambda: replace(good(), calls={}), {"expert calls within 1.2 of ideal"}),
    "nothing was sent": (
        lambda: replace(good(), sent=0, records=[]),
        {
            "each request ends once", "within its deadline + 0.5 s", "no bit is changed",
            "no failure 5 s after healing", "MESH again 5 s after healing",
        },
    ),
    "too few after healing": (
        lambda: replace(good(), healed_s=HEALED_S + 40),
        {"no failure 5 s after healing", "MESH again 5 s after healing"},
    ),
}  # fmt: skip


def test_every_invariant_holds_of_a_run_in_which_nothing_is_wrong() -> None:
    findings = judge(good())
    assert [finding.name for finding in findings] == list(INVARIANTS)
    assert broken(good()) == set()


def test_failures_that_were_agreed_and_degraded_answers_break_nothing_before_healing() -> None:
    records = [
        record(0, code="UNAVAILABLE", answer=b"o", finishes=0),
        record(1, code="RESOURCE_EXHAUSTED", answer=b"", finishes=0, routes=()),
        record(2, routes=("DEGRADED",), exact=False, answer=b"something else"),
        record(3, routes=("MESH", "FULL_MODEL")),
        *(record(number) for number in range(4, 100)),
    ]
    assert broken(replace(good(), records=records)) == set()


@pytest.mark.parametrize("what", BROKEN)
def test_an_invariant_is_broken_by(what: str) -> None:
    evidence, names = BROKEN[what]
    assert broken(evidence()) == names


def test_each_invariant_can_be_broken() -> None:
    assert set().union(*(names for _, names in BROKEN.values())) == set(INVARIANTS)
