from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from expertmesh.client import Client
from expertmesh.errors import Unavailable
from expertmesh.rpc.replicas.caller import ATTEMPT_TIMEOUT_S
from expertmesh.serving.inference import route_name
from expertmesh.v1.inference_pb2 import (
    CONTRACT_DEGRADED_OK,
    CONTRACT_MESH_ONLY,
    ROUTE_DEGRADED,
    ROUTE_FULL_MODEL,
    ROUTE_MESH,
    ClassifyResponse,
)
from tests.up import Up, run, wait_until

CALLERS = 16


@pytest.fixture(scope="module")
def fragile(model: Path) -> Iterator[Up]:
    with Up(model, "--replicas", "expert-3=2", "--no-restart") as up:
        yield up
        up.end_replacements()


class Load:
    """Constant calls from 16 callers; every reply is kept, every failure too."""

    def __init__(self, client: Client, texts: list[str]) -> None:
        self._client = client
        self._texts = texts
        self._stop = asyncio.Event()
        self.replies: list[tuple[str, ClassifyResponse]] = []
        self.failures: list[BaseException] = []

    async def __aenter__(self) -> Load:
        self._tasks = [asyncio.create_task(self._caller(number)) for number in range(CALLERS)]
        await self.until(lambda: len(self.replies) > 5 * CALLERS)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        await asyncio.gather(*self._tasks)

    async def until(self, holds: object) -> None:
        async with asyncio.timeout(30):
            while not holds():  # type: ignore[operator]
                await asyncio.sleep(0.005)

    async def _caller(self, number: int) -> None:
        turn = number
        while not self._stop.is_set():
            text = self._texts[turn % len(self._texts)]
            try:
                self.replies.append((text, await self._client.classify([text])))
            except Exception as error:
                self.failures.append(error)
            turn += 1

    def routes(self, since: int = 0) -> Counter[str]:
        return Counter(route_name(reply.results[0].route) for _, reply in self.replies[since:])


async def test_killed_replicas_lose_no_request_and_change_no_bit(fragile: Up, headlines: list[str]) -> None:
    async with Client(fragile.grpc) as client:
        whole = await client.classify(headlines, route=ROUTE_FULL_MODEL)
        text2logits = {text: list(result.logits) for text, result in zip(headlines, whole.results, strict=True)}

        async with Load(client, headlines) as load:
            await asyncio.to_thread(fragile.kill, "expert-3.0")
            one_died = len(load.replies)
            await load.until(lambda: len(load.replies) > one_died + 10 * CALLERS)
            assert set(load.routes()) == {"mesh"}

            await asyncio.to_thread(fragile.kill, "expert-3.1")
            both_died = len(load.replies)
            await load.until(lambda: len(load.replies) > both_died + 10 * CALLERS)
            assert load.routes(both_died + 4 * CALLERS).keys() == {"full-model"}

            with pytest.raises(Unavailable) as unavailable:
                await client.classify(headlines[:1], contract=CONTRACT_MESH_ONLY)
            assert unavailable.value.expert == 3
            assert unavailable.value.layer is not None
            assert "expert 3" in str(unavailable.value)

            fragile.start_again("expert-3.0")
            await load.until(lambda: load.routes(len(load.replies) - CALLERS).keys() == {"mesh"})

        assert load.failures == []
        assert all(list(reply.results[0].logits) == text2logits[text] for text, reply in load.replies)
        assert all(reply.results[0].exact for _, reply in load.replies)


async def test_http_says_which_route_served_and_which_expert_is_missing(fragile: Up, headlines: list[str]) -> None:
    fragile.end_replacements()
    fragile.replacements = []
    async with httpx.AsyncClient(base_url=fragile.http, timeout=30) as http:
        reply = (await http.post("/api/v1/infer", json={"text": headlines[0]})).json()
        assert reply["route"] == "full-model"
        refused = await http.post("/api/v1/infer", json={"text": headlines[0], "contract": "mesh-only"})
        assert refused.status_code == 503
        assert refused.json()["error"]["expert"] == 3
        assert (await http.get("/readyz")).status_code == 200
        assert 'expertmesh_fallbacks_total{stage="expert-3"}' in (await http.get("/metrics")).text


async def test_without_any_route_the_caller_is_told_at_once(fragile: Up, headlines: list[str]) -> None:
    fragile.kill("full_model.0")
    async with Client(fragile.grpc) as client, httpx.AsyncClient(base_url=fragile.http, timeout=30) as http:
        with pytest.raises(Unavailable) as unavailable:
            await client.classify(headlines[:1])
        assert unavailable.value.expert == 3
        results = (await client.classify(headlines, contract=CONTRACT_DEGRADED_OK)).results
        assert ROUTE_DEGRADED in {result.route for result in results}
        for result in results:
            assert (result.route == ROUTE_MESH) == result.exact == (not result.missing_experts)
            assert {one.expert for one in result.missing_experts} <= {3}
        body = {"text": headlines[0], "contract": "degraded-ok"}
        reply = (await http.post("/api/v1/infer", json=body)).json()
        assert (reply["route"], reply["exact"]) == (route_name(results[0].route), results[0].exact)
        assert [(one["layer"], one["expert"]) for one in reply.get("missing_experts", [])] == [
            (one.layer, one.expert) for one in results[0].missing_experts
        ]
        while (await http.get("/readyz")).status_code != 503:
            await asyncio.sleep(0.01)
        fragile.start_again("expert-3.0")
        async with asyncio.timeout(30):
            while (await http.get("/readyz")).status_code != 200:
                await asyncio.sleep(0.01)
        assert (await client.classify(headlines[:1])).results[0].route != ROUTE_FULL_MODEL


def test_a_service_that_dies_is_started_again_by_up(model: Path) -> None:
    with Up(model, "--expert-services", "1") as up:
        first = up.pid("experts-0-7.0")
        up.kill("experts-0-7.0")
        wait_until(lambda: up.pid("experts-0-7.0") not in (0, first), 30)
        assert up.processes()["experts-0-7.0"]["restarts"] == 1


def test_a_stage_of_another_spec_is_refused_although_its_parts_are_the_same(model: Path, tmp_path: Path) -> None:
    changed = tmp_path / "changed"
    shutil.copytree(model, changed)
    manifest = json.loads((changed / "manifest.json").read_text())
    manifest["spec"]["router"]["renormalise"] = False
    (changed / "manifest.json").write_text(json.dumps(manifest))
    with Up(model, "--expert-services", "1", "--no-restart") as up:
        up.kill("gating.0")
        up.state["model"] = str(changed)
        up.start_again("gating.0")
        log = up.run_dir / "logs" / "gateway.0.log"
        wait_until(lambda: "it was started with another manifest" in log.read_text(), 30)
        ended = run("classify", "--address", up.grpc, "--json", "Striker scores")
        assert json.loads(ended.stdout)["route"] == "full-model"
        up.end_replacements()


async def test_a_neighbour_that_hangs_holds_its_calls_no_longer_than_keepalive_takes(
    model: Path, headlines: list[str]
) -> None:
    with Up(model, "--replicas", "expert-3=2", "--no-restart") as up:
        async with Client(up.grpc) as client:
            await client.classify(headlines)
            pid = up.pid("expert-3.0")
            os.kill(pid, signal.SIGSTOP)
            try:
                started_s = time.monotonic()
                replies = [await client.classify(headlines[:9], contract=CONTRACT_MESH_ONLY) for _ in range(3)]
                took_s = time.monotonic() - started_s
            finally:
                os.kill(pid, signal.SIGCONT)
    assert [len(reply.results) for reply in replies] == [9] * 3  # one at least has asked the one that hangs
    assert took_s < ATTEMPT_TIMEOUT_S - 1  # keepalive finds it within 2 s
