"""What this machine charges every design of this shape: reading weights, and waking processes.

    python -m benchmarks.floor [--json FILE]

Few rows are multiplied as fast as their weights are read, and a layer of experts in processes of their own wakes each
of them once. Measured are therefore how fast one and two processes read memory, and packed weights while they multiply;
and how long it takes to send 1 KiB to processes that do nothing but send it back, over bare unix sockets, without event
loop, message format or check. Before a round with cold caches all of them read as much memory as a small expert has, so
that they wake as experts do. Of these, what the other benchmarks compare is put together: less is not to be had here,
however a mesh is written.
"""

from __future__ import annotations

import asyncio
import select
import socket
import statistics
import time
from collections.abc import Sequence
from typing import Annotated

import typer
from rich.table import Table

from benchmarks.child import Child
from benchmarks.forked import forked
from benchmarks.layer_case import EXPERT_WIDTH, EXPERTS, TOP_K, WIDTH
from benchmarks.models import MIXTRAL_LAYERS, MIXTRAL_VOCAB
from benchmarks.report import JsonFile, Report, spread
from benchmarks.rounds import Figures, in_turn

WAYS = {"sum of numbers": 0, "products of 2 rows": 2, "products of 4 rows": 4, "products of 16 rows": 16}
PROCESSES = (1, 2)
FAN_OUTS = (1, 2, 8)
MESSAGE_BYTES = 1024
TOUCHED_BYTES = {"warm": 0, "cold": 2**21}
STREAMS = 16


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of each contender.")] = 5,
    seconds: Annotated[float, typer.Option(help="Seconds of each contender in a round.")] = 0.5,
    json_file: JsonFile = None,
) -> None:
    """Prints what reading and waking cost, and what that makes of a layer and of a step."""
    report = Report("floor")
    hops_ms = asyncio.run(_measure_hops(rounds, seconds, report))
    read_gb_s = asyncio.run(_measure_reading(rounds, seconds, report))
    report.tables.append(_floors(read_gb_s, hops_ms, report))
    report.publish(json_file)


async def _measure_reading(rounds: int, seconds: float, report: Report) -> Figures:
    one, other = (Child("benchmarks.floor_reading") for _ in range(2))
    async with one, other:

        async def speed(rows: int, children: Sequence[Child]) -> float:
            speeds: list[float] = await asyncio.gather(*(child.ask(rows=rows, seconds=seconds) for child in children))
            return sum(speeds)

        figures = await in_turn(
            {
                _reading(way, number): lambda rows=rows, number=number: speed(rows, (one, other)[:number])  # type: ignore[misc]
                for way, rows in WAYS.items()
                for number in PROCESSES
            },
            rounds,
        )
    table = Table("reading", *(f"{number} process{'es' if number > 1 else ''}, GB/s" for number in PROCESSES))
    for way in WAYS:
        table.add_row(way, *(spread(figures[_reading(way, number)]) for number in PROCESSES))
    report.tables.append(table)
    report.figures["reading, GB/s"] = figures
    return figures


def _reading(way: str, processes: int) -> str:
    return f"{way}, {processes}"


async def _measure_hops(rounds: int, seconds: float, report: Report) -> Figures:
    with forked([_send_back] * max(FAN_OUTS)) as peers:

        async def fan_out(number: int, touched_bytes: int) -> float:
            return _median_fan_out_ms(peers[:number], touched_bytes, seconds)

        figures = await in_turn(
            {
                _hop(state, number): lambda number=number, touched=touched: fan_out(number, touched)  # type: ignore[misc]
                for state, touched in TOUCHED_BYTES.items()
                for number in FAN_OUTS
            },
            rounds,
        )
    table = Table("1 KiB to so many processes and back, ms", *map(str, FAN_OUTS))
    for state in TOUCHED_BYTES:
        table.add_row(f"{state} caches", *(spread(figures[_hop(state, number)]) for number in FAN_OUTS))
    report.tables.append(table)
    report.figures["hops, ms"] = figures
    return figures


def _hop(state: str, processes: int) -> str:
    return f"{state}, {processes}"


def _send_back(peer: socket.socket) -> None:
    """Sends back what comes, and reads memory for a message that says how much, until nobody is there any more."""
    memory = bytearray(max(TOUCHED_BYTES.values()))
    while data := peer.recv(MESSAGE_BYTES):
        if len(data) < MESSAGE_BYTES:
            _touch(memory, int(data))
        peer.sendall(data)


def _touch(memory: bytearray, count: int) -> None:
    memory.find(1, 0, count)


def _median_fan_out_ms(peers: Sequence[socket.socket], touched_bytes: int, seconds: float) -> float:
    memory = bytearray(touched_bytes)
    took_ms: list[float] = []
    ends_s = time.perf_counter() + seconds
    while time.perf_counter() < ends_s:
        if touched_bytes:
            _fan_out(peers, str(touched_bytes).encode())
            _touch(memory, touched_bytes)
        sent_s = time.perf_counter()
        _fan_out(peers, bytes(MESSAGE_BYTES))
        took_ms.append((time.perf_counter() - sent_s) * 1e3)
    return statistics.median(took_ms)


def _fan_out(peers: Sequence[socket.socket], message: bytes) -> None:
    """Sends a message to all at once and waits until all have sent it back."""
    for peer in peers:
        peer.sendall(message)
    waiting = set(peers)
    while waiting:
        readable, _, _ = select.select(list(waiting), [], [])
        for peer in readable:
            if not peer.recv(MESSAGE_BYTES):
                raise RuntimeError("a process has ended")
            waiting.discard(peer)


def _floors(read_gb_s: Figures, hops_ms: Figures, report: Report) -> Table:
    """Milliseconds of what other benchmarks measure, put together of reading and waking alone."""

    def read_ms(weights: int, way: str, processes: int) -> float:
        return weights * 4 / statistics.median(read_gb_s[_reading(way, processes)]) / 1e6

    def hop_ms(number: int) -> float:
        return statistics.median(hops_ms[_hop("cold", number)])

    expert = 3 * WIDTH * EXPERT_WIDTH
    narrow_expert, attention, head = 3 * 512 * 1024, 512 * (512 + 2 * 256) + 512 * 512, 512 * MIXTRAL_VOCAB
    one, some, many = "products of 2 rows", "products of 4 rows", "products of 16 rows"
    both = max(PROCESSES)
    parts = {
        f"layer, 1 token: {TOP_K} experts": (read_ms(TOP_K * expert, one, both), hop_ms(2)),
        f"layer, 64 tokens: {EXPERTS} experts": (read_ms(EXPERTS * expert, many, both), hop_ms(8)),
        "generate, a step of one stream": (
            MIXTRAL_LAYERS * (read_ms(2 * narrow_expert, one, both) + read_ms(attention, one, 1))
            + read_ms(head, one, 1),
            MIXTRAL_LAYERS * (hop_ms(1) + hop_ms(2)) + 2 * hop_ms(1),
        ),
        f"generate, a step of {STREAMS} streams": (
            MIXTRAL_LAYERS * (read_ms(8 * narrow_expert, some, both) + read_ms(attention, many, 1))
            + read_ms(head, many, 1),
            MIXTRAL_LAYERS * (hop_ms(1) + hop_ms(8)) + 2 * hop_ms(1),
        ),
    }
    table = Table("nothing but reading and waking, ms", "weights", "hops", "both")
    for name, (weights_ms, waking_ms) in parts.items():
        table.add_row(name, *(f"{ms:.2f}" for ms in (weights_ms, waking_ms, weights_ms + waking_ms)))
    report.figures["floors, ms"] = parts
    return table


if __name__ == "__main__":
    typer.run(main)
