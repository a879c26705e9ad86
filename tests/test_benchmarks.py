"""What benchmarks share: children, rounds in turn, targets, echoes, closed loops of callers."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest

from benchmarks import floor
from benchmarks.child import Child
from benchmarks.echo import echoes
from benchmarks.forked import forked
from benchmarks.processor import IS_TOLD, processor_ns
from benchmarks.report import Report, difference, ratio
from benchmarks.rounds import in_turn
from tests import generating, tiny

ANSWERING = "tests.doubles.answering"


async def test_a_child_answers_and_is_held_between_questions() -> None:
    async with Child(ANSWERING) as child:
        assert [await child.ask(number=number) for number in (1, 2)] == [2, 4]
        process = psutil.Process(child._process.pid)
        while process.status() != psutil.STATUS_STOPPED:  # the signal may take a moment
            pass
    assert not process.is_running()
    assert child._process.returncode == 0


async def test_a_child_that_fails_tells_its_last_words() -> None:
    async with Child(ANSWERING) as child:
        with pytest.raises(RuntimeError, match="invalid literal for int"):
            await child.ask(number="seven")


async def test_a_child_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.child.STOP_TIMEOUT_S", 0.0)
    async with Child(ANSWERING) as child:
        pass
    assert child._process.returncode == -signal.SIGKILL


async def test_every_contender_is_asked_once_a_round_and_none_is_always_first() -> None:
    asked: list[str] = []

    async def ask(name: str) -> float:
        asked.append(name)
        return len(asked)

    figures = await in_turn({name: partial(ask, name) for name in "abc"}, 3)
    assert ["".join(asked[at : at + 3]) for at in range(0, len(asked), 3)] == ["abc", "abc", "bca", "cab"]
    assert figures == {"a": [4, 9, 11], "b": [5, 7, 12], "c": [6, 8, 10]}


def test_targets_compare_medians_and_tell_the_spread_of_the_rounds(tmp_path: Path) -> None:
    met = ratio("met", [2.0, 4.0, 9.0], [1.0, 2.0, 3.0], at_most=2)
    missed = difference("missed", [5.0, 7.0, 9.0], [1.0, 1.0, 1.0], "ms", 0.5, at_least=4)
    assert (met.value, met.low, met.high, met.is_met) == (2.0, 2.0, 3.0, True)
    assert (missed.value, missed.low, missed.high, missed.is_met) == (3.0, 2.0, 4.0, False)
    report = Report("a name", {"ms": [1.0]}, targets=[met, missed], notes=["a note"])
    report.publish(tmp_path / "report.json")
    told = json.loads((tmp_path / "report.json").read_text())
    assert [target["met"] for target in told["targets"]] == [True, False]
    assert (told["benchmark"], told["figures"], told["notes"]) == ("a name", {"ms": [1.0]}, ["a note"])


async def test_echoes_reach_as_many_servers_as_there_are_messages() -> None:
    async with echoes(2, tiny.scratch()) as echo:
        await echo.fan_out([b"one", b"another"])
        await echo.fan_out([b"alone"])


@pytest.mark.skipif(not IS_TOLD, reason="only Linux tells the processor time of threads")
def test_processor_time_is_that_of_the_processes_and_not_the_clock() -> None:
    before_ns, used_s = processor_ns([os.getpid()]), time.process_time()
    while time.process_time() - used_s < 0.1:
        pass
    used_ns = processor_ns([os.getpid()]) - before_ns
    assert 0.08e9 < used_ns < (time.process_time() - used_s) * 1e9 + 0.02e9


@pytest.mark.parametrize("touched_bytes", floor.TOUCHED_BYTES.values())
def test_bare_processes_send_back_what_comes_and_end_with_their_sockets(touched_bytes: int) -> None:
    before = set(psutil.Process().children())
    with forked([floor._send_back] * 3) as peers:
        assert floor._median_fan_out_ms(peers[:2], touched_bytes, 0.01) > 0
        peers[2].sendall(b"x" * floor.MESSAGE_BYTES)
        assert peers[2].recv(floor.MESSAGE_BYTES, socket.MSG_WAITALL) == b"x" * floor.MESSAGE_BYTES
        own = set(psutil.Process().children()) - before
        assert len(own) == 3
    assert not any(process.is_running() for process in own)


@pytest.mark.parametrize(("work", "model"), [("classify", tiny.model), ("generate", generating.model)])
async def test_a_model_behind_bare_sockets_computes_what_it_does_in_one_process(
    work: str, model: Callable[[], Path]
) -> None:
    async with Child("benchmarks.bare_model", work, str(model()), "1") as child:  # it compares by itself
        own = psutil.Process(child._process.pid).children()
        for size in (1, 3):
            for way in ("own", "bare"):
                assert await child.ask(way=way, size=size, seconds=0.0) > 0
    assert len(own) > 3
    assert not any(process.is_running() for process in own)
