"""What became of every request: sent when, ended when and how, with which bits."""

from __future__ import annotations

from dataclasses import dataclass, field

OK = "OK"
NEVER = "NEVER"  # in place of a status: it had not ended long after its deadline


@dataclass(frozen=True)
class Record:
    """One request.

    Attributes:
        load: Which load it was part of.
        number: Of the request in its load; every number that was sent has one record.
        kind: "classify" or "generate".
        sample: What was asked, by its number among the samples.
        contract: Its name: EXACT, MESH_ONLY or DEGRADED_OK.
        gateway: Address that was asked.
        due_s: When it should have been sent, in seconds of `time.monotonic`.
        start_s: When it was.
        end_s: When it ended.
        timeout_s: Its deadline.
        code: Name of the status it ended with.
        reason: ErrorInfo that came with a failure, and its text.
        routes: Names of the routes in the order in which they served it: MESH, FULL_MODEL, DEGRADED.
        exact: Whether every message said that it is exact.
        answer: Bits of the answer: logits and probabilities, or tokens with their log probabilities, text and end.
        finishes: How often it was said that the answer is complete; once is right.
        messages: Of a stream; 1 for a reply.
        first_s: From the start to the first message.
        stall_s: Longest time between two messages of a stream.
        stall_at_s: When that began.
    """

    load: int
    number: int
    kind: str
    sample: int
    contract: str
    gateway: str
    due_s: float
    start_s: float
    end_s: float
    timeout_s: float
    code: str
    reason: dict[str, str] = field(default_factory=dict)
    routes: tuple[str, ...] = ()
    exact: bool = False
    answer: bytes = b""
    finishes: int = 0
    messages: int = 0
    first_s: float = 0.0
    stall_s: float = 0.0
    stall_at_s: float = 0.0

    @property
    def is_ok(self) -> bool:
        """Whether it ended well."""
        return self.code == OK

    @property
    def is_degraded(self) -> bool:
        """Whether it says that it was computed without an expert."""
        return "DEGRADED" in self.routes

    @property
    def took_s(self) -> float:
        """From its start to its end."""
        return self.end_s - self.start_s
