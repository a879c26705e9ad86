"""The processes of a local mesh: started, seen healthy, started again when they die or hang, and ended."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from expertmesh.errors import SetupError
from expertmesh.local import logs
from expertmesh.local.child import Child, answers, until_serving, until_silent
from expertmesh.local.lifeline import Lifeline
from expertmesh.local.plan import START_TIMEOUT_S, Process

STOP_TIMEOUT_S = 8.0
KILL_TIMEOUT_S = 5.0
RESTART_FIRST_S = 0.5
RESTART_MOST_S = 30.0
FORGET_RESTARTS_S = 60.0


class Processes:
    """Children by name.

    Args:
        folder: Where their logs go.
        restart: Whether a member of the mesh that dies is started again, after a delay that doubles.
        hang_s: After how many seconds without an answer one counts as hung, and is killed; 0: never.
        changed: Is told of every child whose state changes.

    Attributes:
        failure: Raises SetupError once nothing can be started any more.
    """

    def __init__(self, folder: Path, restart: bool, hang_s: float, changed: Callable[[Child], None]) -> None:
        self._folder = folder
        self._restart = restart
        self._hang_s = hang_s
        self._changed = changed
        self._name2child: dict[str, Child] = {}
        self._service2last_log: dict[str, Path] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lifeline: Lifeline | None = None
        self._stopping = False
        self.failure: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def __iter__(self) -> Iterator[Child]:
        return iter(list(self._name2child.values()))

    def __getitem__(self, name: str) -> Child:
        return self._name2child[name]

    def at(self, address: str) -> Child:
        """What listens at an address, or is to."""
        return next(child for child in self if child.process.address == address)

    def make_members(self, addresses: Container[str]) -> None:
        """Makes the children at some addresses, and no others, members of the mesh: they are started again."""
        for child in self:
            was_member, child.member = child.member, child.process.address in addresses
            if not was_member and self._is_missed(child):
                self._spawn(self._start_again(child))

    async def open(self) -> None:
        """Makes ready to start processes."""
        self._folder.mkdir(exist_ok=True)
        for log in self._folder.iterdir():
            log.unlink()
        self._lifeline = await Lifeline.open()
        self._spawn(self._listen(self._lifeline))
        self._spawn(logs.keep_bounded(lambda: [child.log for child in self]))

    async def close(self) -> None:
        """Ends every process and kills what does not end in time; stages serve until the gateways have drained."""
        self._stopping = True
        if self._lifeline is None:
            return
        if self.failure.done():
            self.failure.exception()
        await self.end([child for child in self if child.process.kind == "gateway"])
        await self.end([child for child in self if child.process.kind != "gateway"])
        await self._lifeline.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def add(self, processes: Iterable[Process]) -> list[Child]:
        """Takes on processes that are not members of the mesh yet, which are then to be brought up."""
        children = [Child(process, self._folder / f"{process.name}.log") for process in processes]
        self._name2child |= {child.process.name: child for child in children}
        return children

    async def bring_up(self, children: Sequence[Child]) -> None:
        """Starts children and returns when all are healthy.

        Raises:
            SetupError: One has ended instead, which it says at once, or was not healthy in time.
        """
        assert self._lifeline is not None
        for child in children:
            self._launch(child)
        waits: set[asyncio.Future[Any]] = {child.outcome for child in children}
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while waits and not any(child.has_failed for child in children):
                    await asyncio.wait({*waits, self.failure}, return_when=asyncio.FIRST_COMPLETED)
                    if self.failure.done():
                        self.failure.result()
                    waits = {future for future in waits if not future.done()}
        except TimeoutError:
            late = ", ".join(child.process.name for child in children if not child.outcome.done())
            raise SetupError(f"not ready within {START_TIMEOUT_S:.0f} s: {late}") from None
        for child in children:
            if child.has_failed:
                said = logs.last_words(child.log)
                raise SetupError(f"{child.process.name} could not start ({child.failure}): {said}")

    async def end(self, children: Sequence[Child]) -> None:
        """Ends children, those that do not end by themselves by force."""
        assert self._lifeline is not None
        for number, patience_s in ((signal.SIGTERM, STOP_TIMEOUT_S), (signal.SIGKILL, KILL_TIMEOUT_S)):
            alive = [child for child in children if not child.ended.is_set()]
            for child in alive:
                child.leaving = True
                child.unfollow()
                if child.pid:
                    self._lifeline.signal(child.pid, number)
            if alive and self._lifeline.is_open:
                with suppress(TimeoutError):
                    async with asyncio.timeout(patience_s):
                        await asyncio.gather(*(child.ended.wait() for child in alive))

    def forget(self, children: Sequence[Child]) -> None:
        """Removes what ended children leave but for the log of the last one of each service."""
        for child in children:
            child.clean()
            del self._name2child[child.process.name]
            if before := self._service2last_log.get(child.process.service):
                logs.remove(before)
            self._service2last_log[child.process.service] = child.log

    def _launch(self, child: Child) -> None:
        assert self._lifeline is not None
        child.begin()
        self._lifeline.start(child.process, child.log)

    async def _listen(self, lifeline: Lifeline) -> None:
        """Follows what the nursery tells."""
        async for event in lifeline.events():
            child = self._name2child.get(event["name"])
            if child is None:  # forgotten, since it did not even end when it was killed
                continue
            if event["event"] == "started":
                child.pid = event["pid"]
                self._set(child, "starting")
                if child.leaving:
                    lifeline.signal(child.pid, signal.SIGTERM)
                else:
                    child.follower = self._spawn(self._follow(child, lifeline))
            else:
                self._ended(child, event["status"])
        if not self._stopping and not self.failure.done():
            for child in self:
                if child.pid:
                    with suppress(ProcessLookupError):
                        os.kill(child.pid, signal.SIGKILL)
            self.failure.set_exception(SetupError("the process that starts the services ended; so did they"))

    async def _follow(self, child: Child, lifeline: Lifeline) -> None:
        """Sees a process healthy, and kills it if it hangs, before that or later."""
        try:
            await self._until_serving(child)
        except TimeoutError:
            self._set(child, f"no answer within {START_TIMEOUT_S:.0f} s, so it is killed")
            lifeline.signal(child.pid, signal.SIGKILL)
            return
        child.outcome.set_result(True)
        child.healthy_since_s = time.monotonic()
        self._set(child, "ready")
        if self._restart and self._hang_s:
            await until_silent(child.process.address, self._hang_s)
            self._set(child, f"no answer for {self._hang_s:.0f} s, so it is killed")
            lifeline.signal(child.pid, signal.SIGKILL)

    async def _until_serving(self, child: Child) -> None:
        """Waits as long as a process says at least that it does not serve yet.

        Raises:
            TimeoutError: It says nothing, and one that hangs is to be killed.
        """
        while True:
            try:
                async with asyncio.timeout(START_TIMEOUT_S if self._restart and self._hang_s else None):
                    await until_serving(child.process.address)
                return
            except TimeoutError:
                if not await answers(child.process.address, self._hang_s):
                    raise

    def _ended(self, child: Child, status: int) -> None:
        child.end(status)
        self._set(child, f"ended ({child.failure})")
        if time.monotonic() - child.healthy_since_s > FORGET_RESTARTS_S:
            child.restarts = 0
        if self._is_missed(child):
            self._spawn(self._start_again(child))

    async def _start_again(self, child: Child) -> None:
        delay_s = min(RESTART_FIRST_S * 2 ** min(child.restarts, 16), RESTART_MOST_S)
        self._set(child, f"restarting in {delay_s:.1f} s")
        await asyncio.sleep(delay_s)
        if self._is_missed(child):
            child.restarts += 1
            self._launch(child)

    def _is_missed(self, child: Child) -> bool:
        gone = child.member and child.ended.is_set() and not child.leaving
        return gone and self._restart and not self._stopping

    def _set(self, child: Child, state: str) -> None:
        child.state = state
        self._changed(child)

    def _spawn(self, coroutine: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
