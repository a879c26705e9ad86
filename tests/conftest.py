from __future__ import annotations

import os
import signal

os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # before gRPC is there: servers that tests end are no news

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from expertmesh.client import Client
from tests.up import Up

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as shells have it for what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what tests start is to be interrupted all the same

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def model() -> Path:
    return ROOT / "models" / "agnews"


@pytest.fixture(scope="session")
def headlines() -> list[str]:
    return (ROOT / "examples" / "headlines.txt").read_text().splitlines()


@pytest.fixture(scope="session")
def mesh(model: Path) -> Iterator[Up]:
    """A mesh with two replicas of expert 3 that every test may use and none may harm."""
    with Up(model, "--replicas", "expert-3=2", "--inspect", "--faults", "--no-restart") as up:
        yield up


@pytest.fixture
async def client(mesh: Up) -> AsyncIterator[Client]:
    async with Client(mesh.grpc) as connected:
        yield connected
