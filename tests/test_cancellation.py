from __future__ import annotations

import asyncio
import random
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import httpx
import pytest

from expertmesh.client import Client
from expertmesh.errors import DeadlineExceeded, Overloaded
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.inference_pb2_grpc import InferenceServiceStub
from tests.generating import Answer, answer_of, asked, metrics_of, model, streamed, until, used_blocks
from tests.up import Up

STREAMS = 200
HOMES = ("gating.0", "full_model.0")
LONG = 400  # tokens of a stream that would take long to end by itself
SPARE_FILES = 4
SPARE_BYTES = 24 * 2**20
SPARE_TASKS = 2  # that may be answering those who look
TASKS = "expertmesh_tasks"
TASKS_EVERY_S = 0.5  # processes count theirs
REST_LOOKS = 60  # in which tasks stay what they are
ROUTES = (pb.ROUTE_MESH, pb.ROUTE_FULL_MODEL)

VICTIM = """
import asyncio, sys
from expertmesh.client import Client
from tests.generating import asked

async def main():
    async with Client(sys.argv[1]) as client:
        async def one(seed):
            async for _ in client.generate(asked(40, 400, temperature=1.0, seed=seed)):
                print(seed, flush=True)
        await asyncio.gather(*map(one, range(10)))

asyncio.run(main())
"""


@pytest.fixture(scope="module")
def up() -> Iterator[Up]:
    with Up(model(), "--expert-services", "1", "--no-restart") as running:
        yield running


async def tasks_at_rest(up: Up) -> dict[str, float]:
    """Tasks of each process, once they have stayed what they are for a while."""
    names = list(up.processes())
    seen: list[list[float]] = []

    async def rests() -> bool:
        seen.append([numbers[TASKS] for numbers in await asyncio.gather(*(metrics_of(up, name) for name in names))])
        of_each = list(zip(*seen[-REST_LOOKS:], strict=True))
        return len(seen) >= REST_LOOKS and all(min(of) > 0 and max(of) - min(of) <= SPARE_TASKS for of in of_each)

    await until(rests, timeout_s=120)
    return dict(zip(names, map(min, zip(*seen[-REST_LOOKS:], strict=True)), strict=True))


@dataclass(frozen=True)
class Rest:
    """A mesh that has served and that nobody asks for anything.

    Attributes:
        tasks: Of each process.
        answer: What it gives to a request.
    """

    tasks: dict[str, float]
    answer: Answer

    @classmethod
    async def of(cls, up: Up) -> Rest:
        """After streams by both routes."""
        async with Client(up.grpc) as client:
            for route in ROUTES:
                await asyncio.gather(*(streamed(client, asked(50, 20, route=route)) for _ in range(40)))
            answer = answer_of(await streamed(client, asked(33, 30)))
            return cls(await tasks_at_rest(up), answer)


@pytest.fixture(scope="module")
def rest(up: Up) -> Rest:
    return asyncio.run(Rest.of(up))


class Baseline:
    """What a mesh holds when nobody asks for anything, and that it holds no more later."""

    def __init__(self, up: Up, tasks: dict[str, float]) -> None:
        self._up = up
        self._tasks = tasks
        self._files = {name: self._open_files(name) for name in up.processes()}
        self._bytes = {name: self._resident_bytes(name) for name in up.processes()}

    async def restored(self) -> None:
        await until(self._is_idle)
        await asyncio.sleep(2 * TASKS_EVERY_S)  # what is told of tasks may be that old, from before the test
        await until(self._has_no_more_tasks)
        await until(self._has_closed)
        for name, before in self._bytes.items():
            assert self._resident_bytes(name) - before < SPARE_BYTES, name

    async def _is_idle(self) -> bool:
        for home in HOMES:
            numbers = await metrics_of(self._up, home)
            if numbers['expertmesh_kv_blocks{state="used"}'] or numbers["expertmesh_kv_sequences"]:
                return False
        for scheduler in ("gateway.0", "full_model.0"):
            numbers = await metrics_of(self._up, scheduler)
            if any(numbers[f'expertmesh_generations{{state="{state}"}}'] for state in ("waiting", "running")):
                return False
        return True

    async def _has_no_more_tasks(self) -> bool:
        for name, before in self._tasks.items():
            if (await metrics_of(self._up, name))[TASKS] > before + SPARE_TASKS:
                return False
        return True

    async def _has_closed(self) -> bool:
        return all(self._open_files(name) <= before + SPARE_FILES for name, before in self._files.items())

    def _open_files(self, name: str) -> int:
        return len(list(Path(f"/proc/{self._up.pid(name)}/fd").iterdir()))

    def _resident_bytes(self, name: str) -> int:
        status = Path(f"/proc/{self._up.pid(name)}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 2**10


@pytest.fixture
async def baseline(up: Up, rest: Rest) -> AsyncIterator[Baseline]:
    """Checks around a test that a mesh that has served before ends as it began."""
    async with Client(up.grpc) as client:
        found = Baseline(up, rest.tasks)
        yield found
        await found.restored()
        for route in ROUTES:
            assert answer_of(await streamed(client, asked(33, 30, route=route))) == rest.answer


def endless(number: int, **fields: object) -> pb.GenerateRequest:
    """A long stream; a few take several choices, or prompts of several chunks."""
    prompt = [3, 40, 100, 100][number % 4]
    return asked(prompt, LONG, temperature=1.0, seed=number, n=1 + (number % 10 == 0), **fields)


@pytest.mark.parametrize("route", ROUTES)
async def test_200_streams_left_at_random_moments_leave_nothing(up: Up, baseline: Baseline, route: pb.Route) -> None:
    chance = random.Random(6)
    left = []

    async def by_cancel(number: int, messages: int) -> None:
        async with Client(up.grpc) as client, aclosing(client.generate(endless(number, route=route))) as stream:
            for _ in range(messages):
                await anext(stream)
        left.append("cancel")

    async def by_task(number: int, wait_s: float) -> None:
        async with Client(up.grpc) as client:
            task = asyncio.create_task(streamed(client, endless(number, route=route)))
            await asyncio.wait([task], timeout=wait_s)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        left.append("task")

    async def by_deadline(number: int, wait_s: float) -> None:
        async with Client(up.grpc, timeout_s=wait_s) as client:
            with pytest.raises((DeadlineExceeded, Overloaded)):  # shed where it waited until it was too late for it
                await streamed(client, endless(number, route=route))
        left.append("deadline")

    async def by_channel(number: int, wait_s: float) -> None:
        channel = grpc.aio.insecure_channel(up.grpc, options=(("grpc.use_local_subchannel_pool", 1),))
        call = InferenceServiceStub(channel).Generate(endless(number, route=route), timeout=600)
        await asyncio.wait([asyncio.ensure_future(call.read())], timeout=wait_s)
        await channel.close()
        left.append("channel")

    async def one(number: int) -> None:
        wait_s = chance.uniform(0.0, 2.0)
        match number % 4:
            case 0:
                await by_cancel(number, chance.randrange(12))
            case 1:
                await by_task(number, wait_s)
            case 2:
                await by_deadline(number, 0.01 + wait_s)
            case _:
                await by_channel(number, wait_s)

    await asyncio.gather(*map(one, range(STREAMS)))
    assert sorted(left) == sorted(["cancel", "task", "deadline", "channel"] * (STREAMS // 4))


async def test_events_over_http_that_nobody_reads_any_more_end(up: Up, baseline: Baseline) -> None:
    chance = random.Random(7)

    async def one(number: int) -> None:
        body = {"prompt": [5, 6, 7 + number], "max_tokens": LONG, "stream": True, "ignore_eos": True}
        async with (
            httpx.AsyncClient(base_url=up.http, timeout=60) as http,
            http.stream("POST", "/v1/completions", json=body) as reply,
        ):
            assert reply.status_code == 200
            events = reply.aiter_lines()
            for _ in range(chance.randrange(12)):
                assert "error" not in await anext(events)

    await asyncio.gather(*map(one, range(40)))


async def test_a_client_that_is_killed_leaves_nothing(up: Up, baseline: Baseline) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", VICTIM, up.grpc, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    begun: set[bytes] = set()
    while len(begun) < 10:
        begun.add(await process.stdout.readline())
    assert await used_blocks(up, "gating.0") >= 10
    process.send_signal(signal.SIGKILL)
    await process.wait()


async def test_whoever_waits_for_a_whole_reply_and_leaves_leaves_nothing(up: Up, baseline: Baseline) -> None:
    async with Client(up.grpc) as client:
        calls = [asyncio.create_task(client.complete(endless(number))) for number in range(30)]
        await until(lambda: _holds(up))
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)


async def _holds(up: Up) -> bool:
    return await used_blocks(up, "gating.0") > 0
