from __future__ import annotations

import os
from typing import Any

import pytest

from expertmesh.local.nursery import Nursery


def test_a_process_that_cannot_be_forked_is_told_as_one_that_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> int:
        raise BlockingIOError("no process number is left")

    monkeypatch.setattr(os, "fork", fails)
    told: list[dict[str, Any]] = []
    Nursery(told.append).obey({"do": "start", "name": "expert-0.0"})
    assert told == [{"event": "ended", "name": "expert-0.0", "pid": 0, "status": 1}]
