from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import torch

from expertmesh import wire
from expertmesh.checkpoint.manifest import Manifest, expert_part
from expertmesh.checkpoint.tokenizer import load_classifier_tokenizer
from expertmesh.errors import InvalidInput
from expertmesh.model.sequences import Sequences
from expertmesh.rpc.channel import open_channel
from expertmesh.serving.batcher import Limits
from expertmesh.serving.inference import InferenceServicer, parse_route, route_name
from expertmesh.serving.inspection import InspectionServicer
from expertmesh.serving.requests import MAX_TEXT_BYTES, MAX_TEXTS
from expertmesh.serving.tokenizing import TokenizerServicer
from expertmesh.tokenization.tokenizer import Encoded
from expertmesh.v1 import inference_pb2 as inference
from expertmesh.v1.classifier_pb2 import ScoreRequest
from expertmesh.v1.classifier_pb2_grpc import ClassifierServiceStub, add_ClassifierServiceServicer_to_server
from expertmesh.v1.embedding_pb2 import EmbedRequest
from expertmesh.v1.embedding_pb2_grpc import EmbeddingServiceStub, add_EmbeddingServiceServicer_to_server
from expertmesh.v1.expert_pb2 import ApplyRequest
from expertmesh.v1.expert_pb2_grpc import ExpertServiceStub, add_ExpertServiceServicer_to_server
from expertmesh.v1.fault_pb2 import ChangeWeightRequest
from expertmesh.v1.fault_pb2_grpc import FaultServiceStub, add_FaultServiceServicer_to_server
from expertmesh.v1.gating_pb2 import GateRequest
from expertmesh.v1.gating_pb2_grpc import GatingServiceStub, add_GatingServiceServicer_to_server
from expertmesh.v1.inference_pb2_grpc import InferenceServiceStub, add_InferenceServiceServicer_to_server
from expertmesh.v1.inspection_pb2 import InspectRequest
from expertmesh.v1.inspection_pb2_grpc import InspectionServiceStub, add_InspectionServiceServicer_to_server
from expertmesh.v1.tensor_pb2 import DATA_TYPE_INT64, Tensor
from expertmesh.v1.tokenizer_pb2 import DecodeRequest, EncodeRequest
from expertmesh.v1.tokenizer_pb2_grpc import TokenizerServiceStub, add_TokenizerServiceServicer_to_server
from services.classifier.service import ClassifierServicer
from services.embedding.service import EmbeddingServicer
from services.expert.faults import FaultServicer, MisbehavingExpert
from services.expert.service import ExpertServicer
from services.full_model.service import LocalClassifier
from services.gating.service import GatingServicer
from tests import tiny

INVALID = grpc.StatusCode.INVALID_ARGUMENT
WRONG_PART = grpc.StatusCode.FAILED_PRECONDITION
MAX_MESSAGE_BYTES = 2**20
HELD = [(0, 0), (0, 1), (0, 3), (1, 2)]
TEXTS = ["Oil prices rose on Monday.", "The team won", "A storm closed schools and a camera works in the dark."]


@dataclass
class Stages:
    """Stubs of every service, all behind one unix socket."""

    tokenizer: Any
    embedding: Any
    gating: Any
    expert: Any
    classifier: Any
    full_model: Any
    inspection: Any
    faults: Any


@pytest.fixture
async def stages() -> AsyncIterator[Stages]:
    manifest = Manifest.read(tiny.model())
    tokenizer = load_classifier_tokenizer(tiny.model(), manifest)
    experts = ExpertServicer(tiny.stage("expert"), HELD)
    full = tiny.stage("full_model")
    local = LocalClassifier(full, Limits())
    registrations = [
        (add_TokenizerServiceServicer_to_server, TokenizerServicer(tokenizer, manifest.spec)),
        (add_EmbeddingServiceServicer_to_server, EmbeddingServicer(tiny.stage("embedding"))),
        (add_GatingServiceServicer_to_server, GatingServicer(tiny.stage("gating"))),
        (add_ExpertServiceServicer_to_server, experts),
        (add_FaultServiceServicer_to_server, FaultServicer(experts.bank, MisbehavingExpert(experts))),
        (add_ClassifierServiceServicer_to_server, ClassifierServicer(tiny.stage("classifier"))),
        (add_InferenceServiceServicer_to_server, InferenceServicer(full.spec, local)),
        (add_InspectionServiceServicer_to_server, InspectionServicer(local.inspect)),
    ]
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(
            tiny.served(*registrations, address=f"unix:{tiny.scratch()}/all.sock", max_message_bytes=MAX_MESSAGE_BYTES)
        )
        channel = await stack.enter_async_context(open_channel(address))
        yield Stages(
            TokenizerServiceStub(channel),
            EmbeddingServiceStub(channel),
            GatingServiceStub(channel),
            ExpertServiceStub(channel),
            ClassifierServiceStub(channel),
            InferenceServiceStub(channel),
            InspectionServiceStub(channel),
            FaultServiceStub(channel),
        )


def encoded(texts: list[str] = TEXTS) -> Encoded:
    manifest = Manifest.read(tiny.model())
    return load_classifier_tokenizer(tiny.model(), manifest).encode(texts, manifest.spec.context)


def tensor(*values: int) -> Tensor:
    return wire.encode(np.array(values, np.int32))


def rows(count: int = 5, seed: int = 0) -> Tensor:
    return wire.encode(tiny.random_rows(count, seed))


def with_value(value: float) -> Tensor:
    array = tiny.random_rows(5)
    array[4, 31] = value
    return wire.encode(array)


def changed(tensor: Tensor, **fields: Any) -> Tensor:
    plain = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data": tensor.data}
    return Tensor(**{**plain, **fields})


def bits(tensor: Tensor, dtype: np.dtype[Any] = wire.FLOAT32) -> tuple[tuple[int, ...], bytes]:
    return tuple(tensor.shape), wire.decode(tensor, dtype, tuple(tensor.shape), "reply").tobytes()


def bits_of(tensor: torch.Tensor, dtype: np.dtype[Any] = wire.FLOAT32) -> tuple[tuple[int, ...], bytes]:
    array = tensor.detach().numpy().astype(dtype)
    return array.shape, array.tobytes()


async def refusal(call: Any, request: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(request, timeout=10)
    return caught.value


# What each stage gives is what the full model's own stage gives.


async def test_tokenizer_gives_ids_and_text(stages: Stages) -> None:
    reply = await stages.tokenizer.Encode(EncodeRequest(texts=TEXTS))
    expected = encoded()
    assert bits(reply.ids, wire.INT32)[1] == expected.ids_T.tobytes()
    assert bits(reply.lengths, wire.INT32)[1] == expected.lengths_B.tobytes()
    assert list(reply.truncated) == [False, False, False]
    cut = await stages.tokenizer.Encode(EncodeRequest(texts=TEXTS, max_tokens=2))
    assert bits(cut.lengths, wire.INT32)[1] == np.array([2, 2, 2], np.int32).tobytes()
    assert list(cut.truncated) == [True, True, True]
    first = reply.ids.data[: 4 * int(expected.lengths_B[0])]
    decoded = await stages.tokenizer.Decode(
        DecodeRequest(ids=Tensor(dtype=reply.ids.dtype, shape=[len(first) // 4], data=first))
    )
    assert decoded.text.replace(" ", "").lower() == TEXTS[0].replace(" ", "").lower()


async def test_a_text_of_which_nothing_is_left_has_no_tokens(stages: Stages) -> None:
    reply = await stages.tokenizer.Encode(EncodeRequest(texts=["<b></b>"]))
    assert bits(reply.lengths, wire.INT32)[1] == bytes(4)
    assert wire.decode(reply.ids, wire.INT32, (0,), "ids").size == 0


async def test_embedding_is_the_full_models(stages: Stages) -> None:
    texts = encoded()
    reply = await stages.embedding.Embed(
        EmbedRequest(ids=wire.encode(texts.ids_T), lengths=wire.encode(texts.lengths_B))
    )
    with torch.inference_mode():
        expected = tiny.full_model().embedding(
            torch.from_numpy(texts.ids_T).long(), Sequences(torch.from_numpy(texts.lengths_B))
        )
    assert bits(reply.rows) == bits_of(expected)


@pytest.mark.parametrize("layer", range(tiny.LAYERS))
async def test_gating_is_the_full_models(stages: Stages, layer: int) -> None:
    lengths = [1, 17, 40, 3]
    x_TD = tiny.random_rows(sum(lengths))
    reply = await stages.gating.Gate(GateRequest(layer=layer, rows=wire.encode(x_TD), lengths=tensor(*lengths)))
    with torch.inference_mode():
        expected = tiny.full_model().gating[layer](torch.from_numpy(x_TD), Sequences(torch.tensor(lengths)))
    assert bits(reply.residual) == bits_of(expected.residual_TD)
    assert bits(reply.expert_input) == bits_of(expected.expert_input_TD)
    assert bits(reply.expert_ids, wire.INT32) == bits_of(expected.expert_ids_TK, wire.INT32)
    assert bits(reply.weights) == bits_of(expected.weights_TK)


async def test_experts_are_the_full_models_and_say_which_they_are(stages: Stages) -> None:
    counts = [1, 9, 4]
    rows_ND = tiny.random_rows(sum(counts))
    reply = await stages.expert.Apply(
        ApplyRequest(layer=0, experts=[0, 1, 3], counts=counts, rows=wire.encode(rows_ND))
    )
    pieces = torch.from_numpy(rows_ND).split(counts)
    experts = tiny.full_model().experts[0]
    with torch.inference_mode():
        expected = torch.cat([experts[expert](piece) for expert, piece in zip([0, 1, 3], pieces, strict=True)])
    assert bits(reply.rows) == bits_of(expected)
    assert reply.layer == 0
    assert list(reply.experts) == [0, 1, 3]
    parts = Manifest.read(tiny.model()).parts
    assert list(reply.digests) == [parts[expert_part(0, expert)].digest for expert in (0, 1, 3)]
    other = await stages.expert.Apply(ApplyRequest(layer=1, experts=[2], counts=[14], rows=wire.encode(rows_ND)))
    assert list(other.digests) == [parts[expert_part(1, 2)].digest]
    assert other.rows.data != reply.rows.data


async def test_classifier_is_the_full_models(stages: Stages) -> None:
    lengths = [2, 30, 1]
    x_TD = tiny.random_rows(sum(lengths))
    reply = await stages.classifier.Score(ScoreRequest(rows=wire.encode(x_TD), lengths=tensor(*lengths)))
    with torch.inference_mode():
        expected = tiny.full_model().classifier(torch.from_numpy(x_TD), Sequences(torch.tensor(lengths)))
    assert bits(reply.logits) == bits_of(expected.logits_BC)
    assert bits(reply.probabilities) == bits_of(expected.probabilities_BC)


async def test_full_model_classifies(stages: Stages) -> None:
    reply = await stages.full_model.Classify(inference.ClassifyRequest(texts=TEXTS, include_experts=True))
    texts = encoded()
    with torch.inference_mode():
        expected = tiny.full_model()(torch.from_numpy(texts.ids_T).long(), torch.from_numpy(texts.lengths_B))
    assert np.array([result.logits for result in reply.results], np.float32).tobytes() == bits_of(expected.logits_BC)[1]
    assert list(reply.labels) == list(tiny.LABELS)
    for index, result in enumerate(reply.results):
        assert result.label == tiny.LABELS[int(expected.logits_BC[index].argmax())]
        assert (result.route, result.exact) == (inference.ROUTE_FULL_MODEL, True)
        assert result.profile.startswith("cpu-fp32 ")
        assert result.tokens == texts.lengths_B[index]
        counts = wire.decode(result.expert_tokens, wire.INT32, (tiny.LAYERS, tiny.EXPERTS), "expert_tokens")
        assert counts.sum(axis=1).tolist() == [2 * result.tokens] * tiny.LAYERS
    plain = await stages.full_model.Classify(inference.ClassifyRequest(texts=TEXTS))
    assert not plain.results[0].HasField("expert_tokens")
    assert plain.request_id != reply.request_id


async def test_full_model_can_be_inspected(stages: Stages) -> None:
    trace = await stages.inspection.Inspect(InspectRequest(text=TEXTS[0]))
    reply = await stages.full_model.Classify(inference.ClassifyRequest(texts=TEXTS[:1]))
    assert len(trace.layers) == tiny.LAYERS
    assert trace.logits.data == np.array(reply.results[0].logits, np.float32).tobytes()
    assert bits(trace.ids, wire.INT32)[1] == encoded(TEXTS[:1]).ids_T.tobytes()
    assert trace.layers[0].input.data == trace.embedded.data


async def test_a_changed_weight_changes_the_answer_and_nothing_else(stages: Stages) -> None:
    request = ApplyRequest(layer=0, experts=[1], counts=[5], rows=rows())
    before = await stages.expert.Apply(request)
    await stages.faults.ChangeWeight(ChangeWeightRequest(layer=0, expert=1, delta=0.5))
    after = await stages.expert.Apply(request)
    assert after.rows.data != before.rows.data
    assert list(after.digests) == list(before.digests)
    error = await refusal(stages.faults.ChangeWeight, ChangeWeightRequest(layer=1, expert=1))
    assert error.code() is WRONG_PART


# What cannot be right is refused, by its status, and the service answers on.

BAD_ROWS: dict[str, Callable[[], Tensor]] = {
    "no tensor": lambda: Tensor(),
    "too few bytes": lambda: changed(rows(), data=rows().data[:-1]),
    "too many bytes": lambda: changed(rows(), data=rows().data + b"\0"),
    "no bytes": lambda: changed(rows(), data=b""),
    "another dtype": lambda: changed(rows(), dtype=DATA_TYPE_INT64),
    "unknown dtype": lambda: changed(rows(), dtype=99),
    "rank 1": lambda: changed(rows(), shape=[160]),
    "rank 3": lambda: changed(rows(), shape=[1, 5, 32]),
    "another width": lambda: changed(rows(), shape=[10, 16]),
    "zero rows": lambda: changed(rows(), shape=[0, 32], data=b""),
    "negative rows": lambda: changed(rows(), shape=[-5, 32]),
    "overflow": lambda: changed(rows(), shape=[2**62, 32]),
    "overflow to nothing": lambda: changed(rows(), shape=[2**59, 32], data=b""),
    "NaN": lambda: with_value(np.nan),
    "infinity": lambda: with_value(-np.inf),
}
BAD_LENGTHS: dict[str, Tensor] = {
    "none": Tensor(),
    "too few": tensor(4),
    "too many": tensor(5, 1),
    "zero": tensor(5, 0),
    "negative": tensor(6, -1),
    "over the context": tensor(tiny.CONTEXT + 1),
    "int64": wire.encode(np.array([5], np.int64)),
    "rank 2": wire.encode(np.array([[5]], np.int32)),
}


@pytest.mark.parametrize("make", BAD_ROWS.values(), ids=BAD_ROWS.keys())
async def test_bad_rows(stages: Stages, make: Callable[[], Tensor]) -> None:
    calls = [
        (stages.gating.Gate, GateRequest(layer=0, rows=make(), lengths=tensor(5)), "rows"),
        (stages.expert.Apply, ApplyRequest(layer=0, experts=[1], counts=[5], rows=make()), "rows"),
        (stages.classifier.Score, ScoreRequest(rows=make(), lengths=tensor(5)), "rows"),
    ]
    for call, request, field in calls:
        error = await refusal(call, request)
        assert error.code() is INVALID
        assert error.details().startswith(field)
        request.rows.CopyFrom(rows())
        await call(request, timeout=10)


@pytest.mark.parametrize("lengths", BAD_LENGTHS.values(), ids=BAD_LENGTHS.keys())
async def test_bad_lengths(stages: Stages, lengths: Tensor) -> None:
    ids = tensor(1, 2, 3, 4, 5)
    calls = [
        (stages.embedding.Embed, EmbedRequest(ids=ids, lengths=lengths)),
        (stages.gating.Gate, GateRequest(layer=1, rows=rows(), lengths=lengths)),
        (stages.classifier.Score, ScoreRequest(rows=rows(), lengths=lengths)),
    ]
    for call, request in calls:
        error = await refusal(call, request)
        assert error.code() is INVALID
        assert "length" in error.details()
        request.lengths.CopyFrom(tensor(2, 3))
        await call(request, timeout=10)


@pytest.mark.parametrize("id_", [-1, -(2**31), tiny.full_model().spec.embedding.vocab, 2**31 - 1])
async def test_ids_out_of_range(stages: Stages, id_: int) -> None:
    for call, request in (
        (stages.embedding.Embed, EmbedRequest(ids=tensor(1, id_), lengths=tensor(2))),
        (stages.tokenizer.Decode, DecodeRequest(ids=tensor(1, id_))),
    ):
        error = await refusal(call, request)
        assert error.code() is INVALID
        assert error.details().startswith("every id")
        request.ids.CopyFrom(tensor(1, 2))
        await call(request, timeout=10)


@pytest.mark.parametrize("layer", [-1, tiny.LAYERS, 2**31 - 1, -(2**31)])
async def test_an_unknown_layer(stages: Stages, layer: int) -> None:
    for call, request in (
        (stages.gating.Gate, GateRequest(layer=layer, rows=rows(), lengths=tensor(5))),
        (stages.expert.Apply, ApplyRequest(layer=layer, experts=[1], counts=[5], rows=rows())),
    ):
        error = await refusal(call, request)
        assert error.code() is WRONG_PART
        assert f"layer {layer}" in error.details()
        request.layer = 0
        await call(request, timeout=10)


@pytest.mark.parametrize(
    ("experts", "counts", "code", "reason"),
    [
        ([], [], INVALID, "experts"),
        ([], [5], INVALID, "experts"),
        ([1, 1], [2, 3], INVALID, "experts"),
        ([1, 0], [2, 3], INVALID, "experts"),
        ([1], [], INVALID, "counts"),
        ([1], [2, 3], INVALID, "counts"),
        ([0, 1], [5], INVALID, "counts"),
        ([0, 1], [5, 0], INVALID, "counts"),
        ([0, 1], [6, -1], INVALID, "counts"),
        ([0, 1], [2, 2], INVALID, "rows"),
        ([0, 1], [2**31 - 1, 2**31 - 1], INVALID, "rows"),
        ([2], [5], WRONG_PART, "expert 2 of layer 0"),
        ([0, 2], [2, 3], WRONG_PART, "expert 2 of layer 0"),
        ([-1], [5], WRONG_PART, "expert -1"),
        ([4], [5], WRONG_PART, "expert 4"),
        ([2**31 - 1], [5], WRONG_PART, "expert 2147483647"),
    ],
)
async def test_bad_experts_and_counts(
    stages: Stages, experts: list[int], counts: list[int], code: grpc.StatusCode, reason: str
) -> None:
    error = await refusal(stages.expert.Apply, ApplyRequest(layer=0, experts=experts, counts=counts, rows=rows()))
    assert error.code() is code
    assert reason in error.details()
    await stages.expert.Apply(ApplyRequest(layer=0, experts=[0, 1], counts=[2, 3], rows=rows()), timeout=10)


BAD_TEXTS = {
    "none": [],
    "empty": ["fine", ""],
    "blank": [" \n\t"],
    "too many": ["a"] * (MAX_TEXTS + 1),
    "too long": ["x" * (MAX_TEXT_BYTES + 1)],
    "too long in bytes": ["é" * (MAX_TEXT_BYTES // 2 + 1)],
}


@pytest.mark.parametrize("texts", BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
async def test_bad_texts(stages: Stages, texts: list[str]) -> None:
    for call, request in (
        (stages.tokenizer.Encode, EncodeRequest(texts=texts)),
        (stages.full_model.Classify, inference.ClassifyRequest(texts=texts)),
    ):
        error = await refusal(call, request)
        assert error.code() is INVALID
        assert "text" in error.details()
        assert len(error.details()) < 200
        request.texts[:] = ["x" * MAX_TEXT_BYTES]
        await call(request, timeout=30)


@pytest.mark.parametrize("max_tokens", [-1, tiny.CONTEXT + 1, 2**31 - 1])
async def test_bad_max_tokens(stages: Stages, max_tokens: int) -> None:
    error = await refusal(stages.tokenizer.Encode, EncodeRequest(texts=TEXTS, max_tokens=max_tokens))
    assert error.code() is INVALID
    assert error.details().startswith("max_tokens")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"route": inference.ROUTE_MESH}, "full model"),
        ({"contract": inference.CONTRACT_MESH_ONLY}, "full model"),
        ({"route": inference.ROUTE_DEGRADED}, "route"),
        ({"route": 77}, "route"),
        ({"contract": 77}, "contract"),
        ({"contract": inference.CONTRACT_MESH_ONLY, "route": inference.ROUTE_FULL_MODEL}, "contract"),
    ],
)
async def test_routes_that_a_full_model_cannot_go(stages: Stages, fields: dict[str, int], reason: str) -> None:
    error = await refusal(stages.full_model.Classify, inference.ClassifyRequest(texts=TEXTS, **fields))
    assert error.code() is INVALID
    assert reason in error.details().lower()


def test_routes_are_told_by_name_and_a_strange_one_is_not_repeated_at_length() -> None:
    assert parse_route("") == inference.ROUTE_UNSPECIFIED
    for route in (inference.ROUTE_MESH, inference.ROUTE_FULL_MODEL):
        assert parse_route(route_name(route)) == route
    for name in ("degraded", "MESH", "../mesh", "x" * 100_000):
        with pytest.raises(InvalidInput, match="is not known") as caught:
            parse_route(name)
        assert len(str(caught.value)) < 200  # a trailer of more than 8 KiB is cut off with another status


async def test_a_text_of_which_nothing_is_left_fails_only_its_call(stages: Stages) -> None:
    error = await refusal(stages.full_model.Classify, inference.ClassifyRequest(texts=["<br>", "The team won"]))
    assert error.code() is INVALID
    assert (await stages.full_model.Classify(inference.ClassifyRequest(texts=TEXTS))).results


async def test_a_message_at_the_limit_is_read_and_one_byte_more_is_not(stages: Stages) -> None:
    def request(size: int) -> EncodeRequest:
        message = EncodeRequest(texts=["a"] + ["b" * 60_000] * 17)
        message.texts.append("c" * (size - message.ByteSize() - 4))
        assert message.ByteSize() == size
        return message

    assert (await stages.tokenizer.Encode(request(MAX_MESSAGE_BYTES), timeout=30)).lengths
    error = await refusal(stages.tokenizer.Encode, request(MAX_MESSAGE_BYTES + 1))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (await stages.tokenizer.Encode(EncodeRequest(texts=TEXTS), timeout=10)).lengths


async def test_a_bystander_sees_nothing_of_bad_calls(stages: Stages) -> None:
    good = ApplyRequest(layer=0, experts=[1], counts=[5], rows=rows())
    bad = ApplyRequest(layer=0, experts=[1], counts=[5], rows=with_value(np.nan))
    calls = [stages.expert.Apply(bad if index % 2 else good, timeout=20) for index in range(40)]
    expected = (await stages.expert.Apply(good)).rows.data
    for index, call in enumerate(calls):
        if index % 2:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call
            assert caught.value.code() is INVALID
        else:
            assert (await call).rows.data == expected
