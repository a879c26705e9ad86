from __future__ import annotations

import asyncio
import json
import socket

import grpc
import grpc.aio
import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh import wire
from expertmesh.client import Client
from expertmesh.errors import DeadlineExceeded, InvalidInput
from expertmesh.rpc.errors import error_info
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.inference_pb2_grpc import InferenceServiceStub
from tests.up import Up, run, wait_until


async def test_a_reply_tells_everything_the_contract_names(client: Client, headlines: list[str]) -> None:
    response = await client.classify(headlines[:3], include_experts=True)
    assert list(response.labels) == ["World", "Sports", "Business", "Sci/Tech"]
    assert len(response.request_id) == 16
    stages = {timing.stage for timing in response.timings}
    assert stages >= {"tokenizer", "embedding", "gating", "expert", "combine", "classifier"}
    for result in response.results:
        assert result.route == pb.ROUTE_MESH
        assert result.exact
        assert result.profile.startswith("cpu-fp32")
        assert result.label == response.labels[int(np.argmax(result.probabilities))]
        assert sum(result.probabilities) == pytest.approx(1, abs=1e-6)
        counts_LE = wire.decode(result.expert_tokens, wire.INT32, (2, 8), "expert_tokens")
        assert (counts_LE.sum(axis=1) == 2 * result.tokens).all()
        assert not result.truncated


async def test_experts_are_told_only_if_asked_for(client: Client, headlines: list[str]) -> None:
    response = await client.classify(headlines[:1])
    assert not response.results[0].HasField("expert_tokens")


@pytest.mark.parametrize("contract", [pb.CONTRACT_EXACT, pb.CONTRACT_MESH_ONLY, pb.CONTRACT_DEGRADED_OK])
async def test_every_contract_is_accepted(client: Client, headlines: list[str], contract: pb.Contract) -> None:
    response = await client.classify(headlines[:1], contract=contract)
    assert response.results[0].route == pb.ROUTE_MESH


async def test_a_text_longer_than_the_context_is_cut_and_said_so(client: Client) -> None:
    result = (await client.classify(["goal " * 1000])).results[0]
    assert result.truncated
    assert result.tokens == 128


@pytest.mark.parametrize(
    ("texts", "field"),
    [
        ([], "no text"),
        ([""], "texts[0]"),
        (["fine", " \n\t "], "texts[1]"),
        (["x" * (64 * 1024 + 1)], "texts[0]"),
        (["\u00e9" * (32 * 1024 + 1)], "texts[0]"),
        (["a"] * 10_000, "texts"),
    ],
)
async def test_bad_texts_are_refused_by_name(mesh: Up, texts: list[str], field: str) -> None:
    async with grpc.aio.insecure_channel(mesh.grpc) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await InferenceServiceStub(channel).Classify(pb.ClassifyRequest(texts=texts), timeout=20)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert field in refused.value.details()
    assert error_info(refused.value)["reason"] == "INVALID_INPUT"


async def test_the_largest_text_is_accepted(client: Client) -> None:
    assert (await client.classify(["x" * 64 * 1024])).results[0].truncated


@pytest.mark.parametrize("text", ["\u200b", "<b></b>", "\x00"])
async def test_a_text_of_which_nothing_is_left_fails_alone(client: Client, headlines: list[str], text: str) -> None:
    bystander = asyncio.create_task(client.classify(headlines[:8]))
    with pytest.raises(InvalidInput, match="nothing is left"):
        await client.classify([text])
    assert len((await bystander).results) == 8


@pytest.mark.parametrize(
    "request_bytes",
    [b"\x0a\x02\xff\xfe", b"\x0a\xff", b"garbage", b"\x10\x63\x0a\x01a", b"\x18\x63\x0a\x01a", b"\x18\x03\x0a\x01a"],
    ids=["not UTF-8", "truncated", "garbage", "unknown contract", "unknown route", "route degraded"],
)
async def test_undecodable_and_unknown_values_are_invalid_arguments(mesh: Up, request_bytes: bytes) -> None:
    async with grpc.aio.insecure_channel(mesh.grpc) as channel:
        call = channel.unary_unary("/expertmesh.v1.InferenceService/Classify")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call(request_bytes, timeout=20)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert "Traceback" not in refused.value.details()


async def test_mesh_only_does_not_go_with_the_full_model(client: Client) -> None:
    with pytest.raises(InvalidInput, match="MESH_ONLY"):
        await client.classify(["a"], contract=pb.CONTRACT_MESH_ONLY, route=pb.ROUTE_FULL_MODEL)


async def test_a_deadline_that_is_too_short_ends_the_call_in_time(mesh: Up) -> None:
    async with Client(mesh.grpc, timeout_s=0.002) as hurried:
        with pytest.raises(DeadlineExceeded):
            await hurried.classify(["goal " * 100] * 1000)


async def test_a_thousand_texts_do_not_hold_up_one(client: Client, headlines: list[str]) -> None:
    many = asyncio.create_task(client.classify((headlines * 40)[:1024]))
    await asyncio.sleep(0)
    one = await client.classify(headlines[:1])
    assert len(one.results) == 1
    assert not many.done()
    assert len((await many).results) == 1024


@settings(max_examples=40, deadline=None)
@given(text=st.text(min_size=1, max_size=200))
def test_any_unicode_text_gets_an_answer_or_one_clear_error(mesh: Up, text: str) -> None:
    with httpx.Client(timeout=30) as http:
        reply = http.post(f"{mesh.http}/api/v1/infer", content=json.dumps({"text": text}))
    assert reply.status_code == 200 or reply.json()["error"]["status"] == "INVALID_ARGUMENT"


def test_both_http_routes_give_the_same_bits(mesh: Up, headlines: list[str]) -> None:
    with httpx.Client(timeout=30) as http:
        one = http.post(f"{mesh.http}/api/v1/infer", json={"text": headlines[7]}).json()
        two = http.post(f"{mesh.http}/api/v2/infer", json={"text": headlines[7]}).json()
    assert (one["route"], two["route"]) == ("mesh", "full-model")
    for key in ("predicted_category", "confidence", "probabilities", "logits", "exact", "profile", "tokens"):
        assert one[key] == two[key]
    assert one["confidence"] == max(one["probabilities"].values())
    assert one["probabilities"][one["predicted_category"]] == one["confidence"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no json",
        b"[]",
        b"{}",
        b'{"text": 3}',
        b'{"text": ""}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": "a", "surprise": 1}',
        b'{"text": "a", "contract": "none"}',
        b'{"text": "a", "timeout_s": -1}',
        b'{"text": "a", "timeout_s": NaN}',
        b'{"text": "a", "timeout_s": 1e999}',
        b"[" * 5000,
        json.dumps({"text": "x" * 70_000}).encode(),
        b'{"text": "' + b"x" * 2**20 + b'"}',
    ],
    ids=lambda body: body[:24].decode(errors="replace"),
)
def test_bad_http_bodies_get_400_and_one_reason(mesh: Up, body: bytes) -> None:
    with httpx.Client(timeout=30) as http:
        reply = http.post(f"{mesh.http}/api/v1/infer", content=body)
    assert reply.status_code == 400
    assert reply.json()["error"]["status"] == "INVALID_ARGUMENT"
    assert reply.json()["error"]["message"]


def test_http_deadline_and_contract(mesh: Up) -> None:
    with httpx.Client(timeout=30) as http:
        late = http.post(f"{mesh.http}/api/v1/infer", json={"text": "goal", "timeout_s": 1e-6})
        exact = http.post(f"{mesh.http}/api/v1/infer", json={"text": "goal", "contract": "mesh-only"})
    assert late.status_code == 504
    assert exact.json()["route"] == "mesh"


def test_probes_and_metrics(mesh: Up) -> None:
    with httpx.Client(timeout=30) as http:
        assert http.get(f"{mesh.http}/healthz").status_code == 200
        assert http.get(f"{mesh.http}/readyz").text == "ready\n"
        assert http.get(f"{mesh.http}/api/v1/infer").status_code == 405
        http.post(f"{mesh.http}/api/v1/infer", json={"text": "goal"})
        metrics = http.get(f"{mesh.http}/metrics").text
    assert 'expertmesh_texts_total{route="mesh"}' in metrics
    assert 'expertmesh_requests_total{code="200",method="/api/v1/infer"}' in metrics
    assert 'expertmesh_replicas_live{service="expert-3"} 2.0' in metrics
    assert 'expertmesh_queue_seconds_bucket{le="0.0005",stage="pass"}' in metrics


def test_a_caller_that_hangs_up_is_not_worked_for(mesh: Up) -> None:
    host, port = mesh.http.removeprefix("http://").split(":")
    body = json.dumps({"text": "goal " * 12_000}).encode()
    request = f"POST /api/v1/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body

    def left() -> float:
        with httpx.Client(timeout=30) as http:
            text = http.get(f"{mesh.http}/metrics").text
        lines = [line for line in text.splitlines() if 'requests_total{code="499"' in line]
        return sum(float(line.split()[-1]) for line in lines)

    before = left()
    for _ in range(10):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(request)
    wait_until(lambda: left() > before, 20)


def test_a_request_keeps_its_id_on_every_hop(mesh: Up, headlines: list[str]) -> None:
    with grpc.insecure_channel(mesh.grpc) as channel:
        reply = InferenceServiceStub(channel).Classify(
            pb.ClassifyRequest(texts=headlines[:1], route=pb.ROUTE_FULL_MODEL),
            timeout=20,
            metadata=(("expertmesh-request-id", "mine-42"),),
        )
    assert reply.request_id == "mine-42"
    log = (mesh.run_dir / "logs" / "full_model.0.log").read_text()
    assert '"request_id": "mine-42"' in log


async def test_one_bad_text_in_a_call_is_named(client: Client, headlines: list[str]) -> None:
    with pytest.raises(InvalidInput, match=r"texts\[3\]") as refused:
        await client.classify([*headlines[:3], "\x00\x01", headlines[4]])
    assert refused.value.field == "texts[3]"
    with pytest.raises(InvalidInput, match=r"texts\[1\]"):
        await client.classify([headlines[0], "<b></b>"], route=pb.ROUTE_FULL_MODEL)


async def test_one_string_is_not_taken_for_many_texts(client: Client) -> None:
    with pytest.raises(InvalidInput, match="list of strings"):
        await client.classify("abc")


@pytest.mark.parametrize("body", [b'{"text": "a", "timeout_s": 1' + b"0" * 400 + b"}", b'{"text": "a", "\\ud800": 1}'])
def test_surprising_numbers_and_keys_are_bad_requests_too(mesh: Up, body: bytes) -> None:
    with httpx.Client(timeout=30) as http:
        reply = http.post(f"{mesh.http}/api/v1/infer", content=body)
    assert (reply.status_code, reply.json()["error"]["status"]) == (400, "INVALID_ARGUMENT")


async def test_every_replica_computes(mesh: Up, client: Client, headlines: list[str]) -> None:
    await client.classify(headlines)
    await client.classify(headlines)
    seen = json.loads(run("status", "--run-dir", mesh.run_dir, "--json").stdout)["processes"]
    for replica in ("expert-3.0", "expert-3.1"):
        tokens = next(process["expert_tokens"] for process in seen if process["name"] == replica)
        assert sum(tokens.values()) > 0
