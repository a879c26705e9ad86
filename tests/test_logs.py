from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from expertmesh.local import logs
from expertmesh.local.lifeline import Lifeline
from expertmesh.local.plan import Process
from expertmesh.telemetry import logging as events
from tests import tiny


def test_a_log_begins_anew_and_what_was_before_is_kept(tmp_path: Path) -> None:
    log = tmp_path / "gating.0.log"
    with log.open("ab", buffering=0) as writer:  # as the nursery opens it
        for part in (b"one\n", b"two\n"):
            writer.write(part)
            logs.begin_anew(log)
            assert log.read_bytes() == b""
            assert (tmp_path / "gating.0.log.before").read_bytes() == part
        writer.write(b"three\n")
    assert log.read_bytes() == b"three\n"
    logs.remove(log)
    assert list(tmp_path.iterdir()) == []


def test_on_a_full_disk_a_log_is_emptied_all_the_same(tmp_path: Path) -> None:
    log = tmp_path / "gating.0.log"
    log.write_text("one\n")
    (tmp_path / "gating.0.log.before").symlink_to("/dev/full")
    logs.begin_anew(log)
    assert [path.name for path in tmp_path.iterdir()] == ["gating.0.log"]
    assert log.read_bytes() == b""


async def test_only_logs_that_are_long_begin_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "LOG_MOST_BYTES", 10)
    monkeypatch.setattr(logs, "LOOK_EVERY_S", 0.001)
    short, long, gone = (tmp_path / name for name in ("short.log", "long.log", "gone.log"))
    short.write_text("0123456789")
    long.write_text("0123456789\n")
    task = asyncio.create_task(logs.keep_bounded(lambda: [gone, short, long]))
    async with asyncio.timeout(10):
        while long.stat().st_size:
            await asyncio.sleep(0.001)
    task.cancel()
    assert short.read_text() == "0123456789"


def test_an_event_that_finds_no_room_is_lost_and_that_is_all(capfd: pytest.CaptureFixture[str]) -> None:
    program = (
        "from expertmesh.telemetry import logging as log; log.configure('x'); log.event('e'); print('on', flush=True)"
    )
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, check=False)
    assert ended.stdout == b"on\n"
    assert ended.returncode == 0

    before = logging.getLogger().handlers[:]
    try:
        events.configure("x")
        events.event("e", odd={(1,): 2})  # a programming error is told all the same
    finally:
        logging.getLogger().handlers[:] = before
    assert "TypeError" in capfd.readouterr().err


async def test_a_service_that_cannot_start_nor_say_so_takes_no_other_along(tmp_path: Path) -> None:
    lifeline = await Lifeline.open()
    try:
        happens = lifeline.events()
        address = f"unix:{tiny.scratch()}/t.sock"
        stays = Process("tokenizer.0", "tokenizer", "tokenizer", address, [f"--model={tiny.model()}"])
        fails = Process("embedding.0", "embedding", "embedding", address, ["--max-message-bytes=1"])
        lifeline.start(stays, tmp_path / "t.log")
        lifeline.start(fails, Path("/dev/full"))
        seen = [await anext(happens) for _ in range(3)]
        assert [event["name"] for event in seen if event["event"] == "started"] == ["tokenizer.0", "embedding.0"]
        (ended,) = [event for event in seen if event["event"] == "ended"]
        assert (ended["name"], ended["status"]) == ("embedding.0", 2)
        os.kill(seen[0]["pid"], 0)
        lifeline.signal(seen[0]["pid"], signal.SIGKILL)
        assert await anext(happens) == {**seen[0], "event": "ended", "status": -signal.SIGKILL}
    finally:
        await lifeline.close()
