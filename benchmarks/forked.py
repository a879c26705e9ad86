"""Processes that are forked off to work at one end of a socket. Knows nothing but Python."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


@contextmanager
def forked(works: Sequence[Callable[[socket.socket], None]]) -> Iterator[list[socket.socket]]:
    """Gives a socket to a process for each work, which returns when nobody is at the other end any more.

    So they end with this process, however it ends.
    """
    own: list[socket.socket] = []
    pids = []
    for work in works:
        mine, theirs = socket.socketpair()
        pid = os.fork()
        if not pid:
            for one in (*own, mine):
                one.close()
            _run(work, theirs)
        theirs.close()
        own.append(mine)
        pids.append(pid)
    try:
        yield own
    finally:
        for one in own:
            one.close()
        for pid in pids:
            os.waitpid(pid, 0)


def _run(work: Callable[[socket.socket], None], peer: socket.socket) -> None:
    status = 1
    try:
        work(peer)
        status = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(status)
