"""Who of a service's replicas is left for failing or for being slow, which only a look at its peers can tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from expertmesh.rpc.replicas.ejection import Record, Why
from expertmesh.rpc.replicas.replica import Replica, State


class Jury:
    """Judges replicas by their records.

    Args:
        live: Tells the replicas that may get traffic.

    Attributes:
        keeps_sequences: Whether replicas hold something for their callers: then none is left for being slow, since all
            of that would have to be computed anew elsewhere.
    """

    def __init__(self, live: Callable[[], Sequence[Replica]]) -> None:
        self._live = live
        self.keeps_sequences = False

    def look(self, replica: Replica) -> None:
        """Leaves a replica that was slow just now if it is much slower than its peers."""
        if replica.state is State.LIVE and not self.keeps_sequences:
            reason = replica.record.is_slow(self._peers(replica))
            if reason:
                replica.eject(Why.SLOW, reason)

    def failed(self, replica: Replica, reason: str) -> None:
        """Takes a replica that failed out of the traffic, for longer if it fails again and again."""
        if not replica.answers:
            return  # what fails after it was left is no news
        replica.record.failed()
        habit = replica.record.is_failing(self._peers(replica))
        if habit:
            replica.eject(Why.FAILING, f"{habit}, at last: {reason}")
        else:
            replica.lose(reason)

    def _peers(self, replica: Replica) -> list[Record]:
        return [one.record for one in self._live() if one is not replica]
