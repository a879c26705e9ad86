"""What must be true after every run, whatever was broken in it. Each is judged by name; none is ever skipped.

An invariant that has nothing to judge by does not hold: a run must show it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tests.chaos.record import NEVER, Record
from tests.chaos.vitals import Vitals

LATE_S = 0.5
HEAL_S = 5.0
ALLOWED = ("UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED")
MOST_CALLS = 1.2
AFTERWARDS = 10  # requests that must have been sent after healing, to judge by
RSS_SHARE, RSS_BYTES = 0.15, 24 * 2**20  # what memory may have grown by: allocators keep some of a peak
MORE_TASKS = 8  # the gauge is looked at twice a second, whatever health checks and metrics run just then
MORE_DESCRIPTORS = 8  # likewise; a leak of one a request or one a fault is far above it
SHOWN = 5


@dataclass(frozen=True)
class Evidence:
    """What a run has left.

    Attributes:
        sent: Requests that were sent, in all.
        records: Of the requests.
        expected: Right answer of every sample, by kind of request.
        healed_s: When the last fault was over and every process served again, in seconds of `time.monotonic`.
        before: What every process held before the load.
        after: What they held in the end, after a while without load.
        calls: To experts, by why: first, retry, hedge.
    """

    sent: int
    records: Sequence[Record]
    expected: Mapping[str, Sequence[bytes]]
    healed_s: float
    before: Mapping[str, Vitals]
    after: Mapping[str, Vitals]
    calls: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """How it is with one invariant.

    Attributes:
        name: The invariant.
        breaches: What is against it; it holds if there are none.
        figure: What was seen, in words.
    """

    name: str
    breaches: tuple[str, ...]
    figure: str

    @property
    def holds(self) -> bool:
        """Whether it does."""
        return not self.breaches


def judge(evidence: Evidence) -> list[Finding]:
    """Every invariant, in the order below."""
    findings = []
    for name, invariant in INVARIANTS.items():
        figure, breaches = invariant(evidence)
        findings.append(Finding(name, tuple(breaches), figure))
    return findings


Judged = tuple[str, list[str]]


def ends_once(evidence: Evidence) -> Judged:
    """Every request that was sent has one end, and an answer that is OK says once that it is whole."""
    times = Counter((record.load, record.number) for record in evidence.records)
    breaches = [
        f"request {number} of load {load} ended {count} times" for (load, number), count in times.items() if count != 1
    ]
    if len(times) != evidence.sent:
        breaches.append(f"{evidence.sent} were sent and {len(times)} ended")
    if not evidence.sent:
        breaches.append("nothing was sent")
    breaches += [_told(record, "never ended") for record in evidence.records if record.code == NEVER]
    breaches += [
        _told(record, f"is OK and was finished {record.finishes} times")
        for record in evidence.records
        if record.is_ok and record.finishes != 1
    ]
    return f"{evidence.sent} sent, {len(times)} ended", breaches


def ends_in_time(evidence: Evidence) -> Judged:
    """Within its deadline and half a second."""
    over_s = [record.took_s - record.timeout_s for record in evidence.records]
    breaches = [
        _told(record, f"took {record.took_s:.2f} s of {record.timeout_s:g} s")
        for record in evidence.records
        if record.took_s > record.timeout_s + LATE_S
    ]
    return f"longest {max((r.took_s for r in evidence.records), default=0.0):.2f} s", breaches or _none(over_s)


def changes_no_bit(evidence: Evidence) -> Judged:
    """An OK answer is the undisturbed one to the last bit unless it says DEGRADED, and one that broke off began so."""
    breaches, equal = [], 0
    for record in evidence.records:
        right = evidence.expected[record.kind][record.sample]
        if record.is_degraded:
            if record.exact:
                breaches.append(_told(record, "is DEGRADED and says that it is exact"))
        elif record.is_ok and record.answer != right:
            breaches.append(_told(record, "is OK and has other bits"))
        elif not right.startswith(record.answer):
            breaches.append(_told(record, "broke off after other bits than the right ones"))
        else:
            equal += record.is_ok
    return f"{equal} OK and bit-equal", breaches or _none([record for record in evidence.records if record.is_ok])


def fails_as_agreed(evidence: Evidence) -> Judged:
    """Failures are UNAVAILABLE, RESOURCE_EXHAUSTED or DEADLINE_EXCEEDED."""
    failed = [record for record in evidence.records if not record.is_ok]
    breaches = [_told(record, f"ended with {record.code}") for record in failed if record.code not in ALLOWED]
    codes = Counter(record.code for record in failed)
    return ", ".join(f"{count} {code}" for code, count in codes.most_common()) or "no failure", breaches


def heals(evidence: Evidence) -> Judged:
    """5 s after the last fault is over, nothing fails any more."""
    later = _after_healing(evidence)
    breaches = [_told(record, f"failed after healing: {record.code}") for record in later if not record.is_ok]
    return f"{len(later)} requests after healing", breaches or _enough(later)


def returns_to_the_mesh(evidence: Evidence) -> Judged:
    """5 s after the last fault is over, the mesh route alone serves."""
    later = [record for record in _after_healing(evidence) if record.is_ok]
    breaches = [
        _told(record, f"was served by {', '.join(record.routes)}") for record in later if record.routes != ("MESH",)
    ]
    share = sum("FULL_MODEL" in record.routes for record in later) / max(1, len(later))
    return f"fallback share {share:.1%} after healing", breaches or _enough(later)


def memory_returns(evidence: Evidence) -> Judged:
    """The largest process of every service has the memory it had, give or take what allocators keep."""
    before, after = (_most_of(vitals, lambda one: one.rss_bytes) for vitals in (evidence.before, evidence.after))
    breaches = [
        f"{service} has {after[service] / 2**20:.0f} MiB, and had {before[service] / 2**20:.0f}"
        for service in before.keys() & after.keys()
        if after[service] > before[service] * (1 + RSS_SHARE) + RSS_BYTES
    ]
    return _grown(before, after, 2**20, "MiB"), breaches + _missing(before, after)


def tasks_return(evidence: Evidence) -> Judged:
    """Tasks of every event loop are as many as they were."""
    before, after = (_most_of(vitals, lambda one: one.tasks) for vitals in (evidence.before, evidence.after))
    return _grown(before, after, 1, "tasks"), _more(before, after, MORE_TASKS, "tasks") + _missing(before, after)


def descriptors_return(evidence: Evidence) -> Judged:
    """Open descriptors of every process are as many as they were."""
    before, after = (_most_of(vitals, lambda one: one.descriptors) for vitals in (evidence.before, evidence.after))
    breaches = _more(before, after, MORE_DESCRIPTORS, "descriptors")
    return _grown(before, after, 1, "descriptors"), breaches + _missing(before, after)


def blocks_return(evidence: Evidence) -> Judged:
    """No block of a KV cache is held by a sequence that is over."""
    before, after = (_most_of(vitals, lambda one: one.kv_blocks) for vitals in (evidence.before, evidence.after))
    breaches = _more(before, after, 0, "blocks")
    if not after and any(record.kind == "generate" for record in evidence.records):
        breaches.append("no process tells of its blocks")
    return f"{sum(after.values())} blocks held", breaches + _missing(before, after, may_be_empty=True)


def asks_experts_little(evidence: Evidence) -> Judged:
    """Calls to experts are at most 1.2 times those that a run without faults needs."""
    first, every = evidence.calls.get("first", 0.0), sum(evidence.calls.values())
    if not first:
        return "no calls counted", ["expertmesh_calls_total of the gateway says nothing of calls to experts"]
    breaches = [f"{every:.0f} calls where {first:.0f} would do"] if every > MOST_CALLS * first else []
    return f"{every / first:.3f} times ideal ({every:.0f} calls)", breaches


INVARIANTS: Mapping[str, Callable[[Evidence], Judged]] = {
    "each request ends once": ends_once,
    "within its deadline + 0.5 s": ends_in_time,
    "no bit is changed": changes_no_bit,
    "failures are of three kinds": fails_as_agreed,
    "no failure 5 s after healing": heals,
    "MESH again 5 s after healing": returns_to_the_mesh,
    "memory is back": memory_returns,
    "tasks are back": tasks_return,
    "descriptors are back": descriptors_return,
    "KV blocks are back": blocks_return,
    "expert calls within 1.2 of ideal": asks_experts_little,
}


def settled(evidence: Evidence) -> bool:
    """Whether what processes hold is back already, so that there is no need to wait longer."""
    return not any(
        invariant(evidence)[1] for invariant in (memory_returns, tasks_return, descriptors_return, blocks_return)
    )


def _after_healing(evidence: Evidence) -> list[Record]:
    return [record for record in evidence.records if record.start_s >= evidence.healed_s + HEAL_S]


def _enough(later: Sequence[Record]) -> list[str]:
    return [] if len(later) >= AFTERWARDS else [f"only {len(later)} requests to judge by"]


def _none(what: Sequence[object]) -> list[str]:
    return [] if what else ["nothing to judge by"]


def _most_of(vitals: Mapping[str, Vitals], what: Callable[[Vitals], int | None]) -> dict[str, int]:
    """The most that any replica of a service has of something, by service; replicas come and go."""
    most: dict[str, int] = {}
    for name, one in vitals.items():
        if (value := what(one)) is not None:
            service = name.rpartition(".")[0]
            most[service] = max(value, most.get(service, 0))
    return most


def _more(before: Mapping[str, int], after: Mapping[str, int], allowed: int, what: str) -> list[str]:
    return [
        f"{service} has {after[service]} {what}, and had {had}"
        for service, had in before.items()
        if after.get(service, 0) > had + allowed
    ]


def _missing(before: Mapping[str, int], after: Mapping[str, int], may_be_empty: bool = False) -> list[str]:
    gone = [f"{service} does not tell any more" for service in before if service not in after]
    return gone or ([] if may_be_empty else _none(list(before)))


def _grown(before: Mapping[str, int], after: Mapping[str, int], unit: int, name: str) -> str:
    grown = {service: (after[service] - had) / unit for service, had in before.items() if service in after}
    if not grown:
        return "nobody tells"
    most = max(grown, key=lambda service: grown[service])
    return f"{grown[most]:+.0f} {name} at most ({most})"


def _told(record: Record, what: str) -> str:
    text = record.reason.get("text", "")
    return f"{record.kind} {record.number} ({record.contract}) {what}" + (f": {text[:160]}" if text else "")
