from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2

from expertmesh import errors
from expertmesh.rpc.errors import DETAILS_KEY, code_of, error_info, from_call
from expertmesh.telemetry import metrics
from expertmesh.v1.embedding_pb2 import EmbedRequest
from expertmesh.v1.embedding_pb2_grpc import EmbeddingServiceStub, add_EmbeddingServiceServicer_to_server
from expertmesh.v1.tokenizer_pb2_grpc import TokenizerServiceServicer, add_TokenizerServiceServicer_to_server
from tests import tiny
from tests.doubles.failing import Failing
from tests.doubles.hanging import Hanging

METHOD = "/expertmesh.v1.EmbeddingService/Embed"
SECRET = "/etc/expertmesh/secret.key at 10.0.0.7"

TREE = [
    (errors.InvalidInput("text 3 is empty", "texts[3]"), grpc.StatusCode.INVALID_ARGUMENT, "INVALID_INPUT"),
    (errors.WrongPart("no layer 9"), grpc.StatusCode.FAILED_PRECONDITION, "WRONG_PART"),
    (errors.Overloaded("9 texts wait", 2.5), grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    (errors.Unavailable("nobody", "expert-3", 1, 3), grpc.StatusCode.UNAVAILABLE, "UNAVAILABLE"),
    (errors.DeadlineExceeded("the deadline has passed"), grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    (errors.CorruptReply("gating failed"), grpc.StatusCode.DATA_LOSS, "CORRUPT_REPLY"),
]


async def failure(error: BaseException) -> grpc.aio.AioRpcError:
    """How a call ends whose handler raises `error`, seen by the caller."""
    async with (
        tiny.served((add_EmbeddingServiceServicer_to_server, Failing(error))) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await EmbeddingServiceStub(channel).Embed(EmbedRequest(), timeout=10)
    return caught.value


def details(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    return status_pb2.Status.FromString(dict(error.trailing_metadata())[DETAILS_KEY])


def detail(error: grpc.aio.AioRpcError, kind: Callable[[], object]) -> object:
    found = kind()
    assert any(packed.Unpack(found) for packed in details(error).details)
    return found


def all_errors(base: type[errors.MeshError]) -> set[type[errors.MeshError]]:
    return {base}.union(*(all_errors(child) for child in base.__subclasses__()))


def counted(code: grpc.StatusCode) -> float:
    return metrics.REGISTRY.get_sample_value("expertmesh_requests_total", {"method": METHOD, "code": code.name}) or 0.0


async def until_counted(code: grpc.StatusCode, number: float) -> None:
    """A call is counted once its handler is left, which may be after its caller has the status."""
    async with asyncio.timeout(10):
        while counted(code) < number:
            await asyncio.sleep(0)
    assert counted(code) == number


def test_the_drawn_tree_is_the_tree() -> None:
    for error in all_errors(errors.MeshError) - {errors.MeshError}:
        if error.__module__ == errors.__name__:
            assert error.__name__ in errors.__doc__
    for error, code, _ in TREE:
        assert f"{type(error).__name__:<19} {code.name}" in errors.__doc__


@pytest.mark.parametrize(("error", "code", "reason"), TREE, ids=lambda value: getattr(value, "name", None))
async def test_an_error_goes_over_the_wire_and_back(
    error: errors.MeshError, code: grpc.StatusCode, reason: str
) -> None:
    before = counted(code)
    seen = await failure(error)
    assert code_of(error) is seen.code() is code
    assert seen.details() == str(error)
    assert details(seen).code == code.value[0]
    assert details(seen).message == str(error)
    assert error_info(seen)["reason"] == reason
    await until_counted(code, before + 1)
    back = from_call(seen, "embedding")
    assert type(back) is type(error)
    if not isinstance(error, errors.CorruptReply):
        assert str(back) == str(error)


async def test_an_invalid_field_is_named() -> None:
    bad = detail(await failure(errors.InvalidInput("it is empty", "texts[3]")), error_details_pb2.BadRequest)
    assert [(item.field, item.description) for item in bad.field_violations] == [("texts[3]", "it is empty")]


@pytest.mark.parametrize("seconds", [0.25, 1.0, 2.5, 90.0])
async def test_an_overload_says_when_to_try_again(seconds: float) -> None:
    retry = detail(await failure(errors.Overloaded("full", seconds)), error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToNanoseconds() == int(seconds * 1e9)


async def test_unavailability_keeps_stage_layer_and_expert() -> None:
    seen = await failure(errors.Unavailable("nobody", "expert-3", 0, 0))
    assert error_info(seen) == {"reason": "UNAVAILABLE", "stage": "expert-3", "layer": "0", "expert": "0"}
    back = from_call(seen, "the gateway")
    assert (back.stage, back.layer, back.expert) == ("expert-3", 0, 0)
    back = from_call(await failure(errors.Unavailable("nobody", "gating")), "the gateway")
    assert (back.stage, back.layer, back.expert) == ("gating", None, None)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(SECRET),
        KeyError(SECRET),
        OSError(13, "denied", SECRET),
        errors.SetupError(SECRET),
        errors.BadCheckpoint(SECRET),
        errors.MeshError(SECRET),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_what_is_internal_never_reaches_the_caller(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "expertmesh"):
        seen = await failure(error)
    assert seen.code() is grpc.StatusCode.INTERNAL
    everything = f"{seen.details()} {seen.trailing_metadata()}"
    assert "secret" not in everything
    assert "10.0.0.7" not in everything
    assert type(error).__name__ not in everything
    (record,) = [record for record in caplog.records if record.getMessage() == "internal_error"]
    assert record.fields["error_id"] in seen.details()
    assert record.fields["method"] == METHOD
    assert record.exc_info[1] is error


async def test_a_time_out_within_is_a_deadline() -> None:
    assert (await failure(TimeoutError())).code() is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_long_or_strange_message_arrives_as_the_same_status() -> None:
    for text in (
        "zeile\nzeile\r\0",
        "ümläut ☃ \ud800".encode("utf-8", "replace").decode(),
        "x" * 100_000,
        "\U0001f600" * 9_000,
    ):
        seen = await failure(errors.InvalidInput(text, "texts[0]"))
        assert seen.code() is grpc.StatusCode.INVALID_ARGUMENT


UNDECODABLE = {
    "wrong wire type": b"\x0a\x03\x08\x01",
    "truncated": b"\x0a\x7f\x01",
    "no field": b"\x00\x00",
    "end group": b"\x0c",
    "nested too deep": b"\x0b" * 200,
    "not UTF-8": b"\x0a\x02\xc3\x28",
    "garbage": bytes(range(255, 200, -1)),
}


@pytest.mark.parametrize("data", UNDECODABLE.values(), ids=UNDECODABLE.keys())
async def test_a_message_that_cannot_be_parsed_is_invalid(data: bytes) -> None:
    async with (
        tiny.served((add_TokenizerServiceServicer_to_server, TokenizerServiceServicer())) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/expertmesh.v1.TokenizerService/Encode")(data, timeout=10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "cannot be parsed" in caught.value.details()
    assert "Decode" not in caught.value.details()
    assert "utf-8' codec" not in caught.value.details()


async def test_a_method_that_does_not_exist_is_unimplemented() -> None:
    async with (
        tiny.served((add_EmbeddingServiceServicer_to_server, Failing(RuntimeError()))) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary("/expertmesh.v1.EmbeddingService/Nothing")(b"", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert isinstance(from_call(caught.value, "embedding"), errors.WrongPart)


async def test_a_cancelled_call_is_counted_as_cancelled() -> None:
    before = counted(grpc.StatusCode.CANCELLED)
    hanging = Hanging()
    async with (
        tiny.served((add_EmbeddingServiceServicer_to_server, hanging)) as address,
        grpc.aio.insecure_channel(address) as channel,
    ):
        call = EmbeddingServiceStub(channel).Embed(EmbedRequest(), timeout=10)
        await hanging.arrived.wait()
        call.cancel()
        await hanging.cancelled.wait()
    await until_counted(grpc.StatusCode.CANCELLED, before + 1)


def call_error(code: grpc.StatusCode, text: str = "", metadata: bytes | None = None) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata() if metadata is None else grpc.aio.Metadata((DETAILS_KEY, metadata))
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=text)


def test_a_peer_without_details_is_named_by_its_stage() -> None:
    back = from_call(call_error(grpc.StatusCode.UNAVAILABLE, "connect to ipv4:10.0.0.7:1 failed"), "gating")
    assert str(back) == "gating does not answer"
    assert isinstance(back, errors.Unavailable)
    assert back.stage == "gating"


@pytest.mark.parametrize(
    "code",
    [
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.UNKNOWN,
        grpc.StatusCode.DATA_LOSS,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.ABORTED,
    ],
)
def test_a_peers_inner_failure_is_told_without_its_text(code: grpc.StatusCode) -> None:
    back = from_call(call_error(code, SECRET), "gating")
    assert type(back) is errors.Failed
    assert "secret" not in str(back)


def info(**metadata: str) -> bytes:
    status = status_pb2.Status(code=14)
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason="UNAVAILABLE", metadata=metadata))
    return status.SerializeToString()


@pytest.mark.parametrize(
    "metadata",
    [b"", b"\xff\xff", b"\x0a", info(layer="three"), info(expert="-"), info(layer="", expert="1e9")],
    ids=range(6),
)
def test_details_that_are_garbage_do_no_harm(metadata: bytes) -> None:
    back = from_call(call_error(grpc.StatusCode.UNAVAILABLE, "gone", metadata), "gating")
    assert isinstance(back, errors.Unavailable)


def test_log_lines_of_inner_failures_are_json() -> None:
    from expertmesh.telemetry.logging import JsonFormatter

    try:
        raise ValueError("line\nbreak")
    except ValueError as error:
        record = logging.LogRecord("expertmesh", logging.ERROR, "", 0, "internal_error", (), (type(error), error, None))
    line = JsonFormatter("embedding").format(record)
    assert "\n" not in line
    assert "line\nbreak" in json.loads(line)["traceback"]
