"""Who belongs to a service just now: replicas that come and go while calls are made.

A replica that joins is met before it gets traffic. One that leaves gets none as soon as another is live, ends in peace
what is under way there, and is then let go of.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from math import inf
from time import monotonic
from types import TracebackType
from typing import Self

from expertmesh.errors import Unavailable
from expertmesh.rpc.replicas.replica import Replica, State
from expertmesh.rpc.replicas.resolver import Names

LEAVE_TIMEOUT_S = 30.0  # what is under way at a replica that leaves gets so long
LOOK_EVERY_S = 0.05


class Members:
    """The replicas of one service. Use as an async context manager.

    Args:
        make: Makes a replica of an address.
        addresses: Those that belong to it at first; names among them are looked up while it is open.
        names: Makes what looks names up, given what to tell of addresses.
    """

    def __init__(
        self,
        make: Callable[[str], Replica],
        addresses: Iterable[str],
        names: Callable[[Callable[[list[str]], None]], Names] = Names,
    ) -> None:
        self._make = make
        self._is_open = self._is_leaving = False
        self._address2member: dict[str, Replica] = {}
        self._follows: dict[Replica, asyncio.Task[None]] = {}
        self._leaves: dict[Replica, asyncio.Task[None]] = {}
        self.replicas: list[Replica] = []
        self._names = names(self._set_replicas)
        self._names.list(addresses)

    async def __aenter__(self) -> Self:
        """Starts to follow every replica."""
        self._is_open = True
        for replica in self.replicas:
            self._follow(replica)
        self._looks_up = asyncio.create_task(self._names.follow())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Ends that and closes the channels."""
        self._is_open = False
        replicas = {*self.replicas, *self._leaves}
        tasks = [self._looks_up, *self._leaves.values(), *self._follows.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in replicas:
            await replica.close()

    @property
    def live(self) -> list[Replica]:
        """The replicas that may get traffic: those that drain only where there are no others."""
        return [one for one in self.replicas if one.state is State.LIVE] or [
            one for one in self.replicas if one.state is State.DRAINING
        ]

    def pick(self, tried: Sequence[str], at: Replica | None = None) -> Replica | None:
        """Whom to ask next: the one with the fewest calls under way, among equals in turn; who is busy or drains, last.

        Args:
            tried: Addresses that are not to be asked again.
            at: The only one to ask.
        """
        if at is not None:
            return at if at.answers and at.address not in tried else None
        if len(self.replicas) == 1:
            only = self.replicas[0]
            return only if only.answers and only.address not in tried else None
        best, least, now_s = None, (inf, inf, inf, inf), monotonic()
        for one in self.replicas:
            if one.answers and one.address not in tried:
                draining, busy = one.state is State.DRAINING, one.is_busy_at(now_s)
                rank = (draining, busy, one.calls_under_way, one.last_turn)
                if rank < least:
                    best, least = one, rank
        return best

    def unavailable(self, service: str) -> Unavailable:
        """The error that says that nobody is left."""
        states = Counter(replica.state.value for replica in self.replicas)
        told = ", ".join(f"{number} {state}" for state, number in sorted(states.items()))
        return Unavailable(f"no replica of {service} answers ({told})", service)

    @property
    def are_met(self) -> bool:
        """Whether every address has a live replica, which of a name's may be any."""
        live = {one.address for one in self.replicas if one.state is State.LIVE}
        return all(live.intersection(group) for group in self._names.groups)

    def set_addresses(self, addresses: Iterable[str]) -> None:
        """Lets replicas join and leave, so that exactly these addresses belong to it."""
        self._names.list(addresses)

    def look_up(self) -> None:
        """Has names looked up at once."""
        self._names.wake()

    def _set_replicas(self, addresses: Iterable[str]) -> None:
        wanted = dict.fromkeys(addresses)
        for address in [address for address in self._address2member if address not in wanted]:
            self._dismiss(self._address2member.pop(address))
        for address in wanted:
            if address not in self._address2member:
                self._address2member[address] = self._join(address)

    async def leave(self) -> None:
        """Lets all of them leave, and waits until they are gone."""
        self._is_leaving = True
        self.set_addresses(())
        await asyncio.gather(*self._leaves.values(), return_exceptions=True)

    def _join(self, address: str) -> Replica:
        back = next((one for one in self.replicas if one.address == address and one in self._leaves), None)
        if back is not None:
            self._leaves.pop(back).cancel()
            back.list(True)
            return back
        replica = self._make(address)
        self.replicas = [*self.replicas, replica]
        if self._is_open:
            self._follow(replica)
        return replica

    def _follow(self, replica: Replica) -> None:
        self._follows[replica] = asyncio.create_task(replica.follow())

    def _dismiss(self, replica: Replica) -> None:
        replica.list(False)
        self._leaves[replica] = asyncio.create_task(self._let_go(replica))

    async def _let_go(self, replica: Replica) -> None:
        """Waits until nobody needs a replica that leaves, and forgets it."""
        left_s = LEAVE_TIMEOUT_S
        while replica.answers and left_s > 0:
            if self._is_leaving or any(one.state is State.LIVE for one in self.replicas):
                if not replica.is_needed:
                    break
                left_s -= LOOK_EVERY_S
            await asyncio.sleep(LOOK_EVERY_S)  # as long as nobody is live in its place it is better than none
        self.replicas = [one for one in self.replicas if one is not replica]  # from here on it does not come back
        follow = self._follows.pop(replica, None)
        if follow is not None:
            follow.cancel()
            await asyncio.gather(follow, return_exceptions=True)
        await replica.close()
        del self._leaves[replica]
        replica.tell("left")
