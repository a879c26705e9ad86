from __future__ import annotations

import functools
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import pytest
import safetensors.torch
import torch

from expertmesh import wire
from expertmesh.checkpoint.split import SPEC_FILE, TOKENIZER_FOLDER, WEIGHTS_FILE, split
from expertmesh.errors import InvalidInput, WrongPart
from expertmesh.model.full import FullModel
from expertmesh.model.sampling import sample
from expertmesh.model.spec import AttentionSpec, EmbeddingSpec, ExpertSpec, HeadSpec, ModelSpec, RouterSpec
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.errors import error_info
from expertmesh.rpc.settings import read_settings
from expertmesh.serving.sampling import decode_draws, encode_tokens
from expertmesh.telemetry import tracing
from expertmesh.v1.classifier_pb2 import Draw, SampleRequest, SampleResponse, ScoreRequest
from expertmesh.v1.classifier_pb2_grpc import (
    ClassifierServiceServicer,
    ClassifierServiceStub,
    add_ClassifierServiceServicer_to_server,
)
from expertmesh.v1.sampling_pb2 import Sampling
from services.classifier.__main__ import ClassifierSettings, load
from services.classifier.language import ROWS_AT_ONCE, LanguageHeadServicer
from services.classifier.service import ClassifierServicer
from tests import tiny

WIDTH, VOCAB, CONTEXT = 16, 301, 200
SPEC = ModelSpec(
    width=WIDTH,
    layers=1,
    context=CONTEXT,
    embedding=EmbeddingSpec(vocab=VOCAB, learned_positions=False),
    attention=AttentionSpec(heads=2, kind="grouped", kv_heads=1, head_width=8),
    router=RouterSpec(experts=2, top_k=1),
    expert=ExpertSpec(width=8),
    head=HeadSpec(kind="language", divisor=0.25),  # far from level, so that draws differ
)


@functools.cache
def model() -> Path:
    source, target = tiny.scratch() / "checkpoint", tiny.scratch() / "split"
    shutil.copytree(tiny.checkpoint() / TOKENIZER_FOLDER, source / TOKENIZER_FOLDER)
    with torch.random.fork_rng():
        torch.manual_seed(11)
        weights = FullModel(SPEC).state_dict()
    (source / SPEC_FILE).write_text(json.dumps(SPEC.to_dict()))
    safetensors.torch.save_file({name: value.contiguous() for name, value in weights.items()}, source / WEIGHTS_FILE)
    split(source, target)
    return target


def logits_of(x_BD: np.ndarray) -> torch.Tensor:
    head = tiny.stage("classifier", model()).loader.classifier()
    with torch.inference_mode():
        return head(torch.from_numpy(x_BD))  # type: ignore[no-any-return]


def random_rows(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)


def random_draws(count: int) -> list[Draw]:
    """Greedy, plain, and with every step, in turn."""
    settings = [{"temperature": 0}, {"temperature": 1}, {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.01}]
    return [
        Draw(
            sampling=Sampling(**{"top_p": 1, **settings[row % 3]}, repetition_penalty=1 + row % 2, seed=row // 5),
            choice=row % 4,
            position=row,
            seen=range(row),
            logprobs=row % 5 - 1,
        )
        for row in range(count)
    ]


@asynccontextmanager
async def head_of(**options: object) -> AsyncIterator[ClassifierServiceStub]:
    servicer = LanguageHeadServicer(tiny.stage("classifier", model()), **options)  # type: ignore[arg-type]
    async with (
        tiny.served((add_ClassifierServiceServicer_to_server, servicer)) as address,
        open_channel(address) as channel,
    ):
        yield ClassifierServiceStub(channel)


async def refusal(call: object, request: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(request, timeout=10)  # type: ignore[operator]
    return caught.value.code(), error_info(caught.value).get("field", "")


async def test_tokens_are_those_of_the_heads_logits_alone_and_together() -> None:
    x_BD, draws = random_rows(2 * ROWS_AT_ONCE + 5), random_draws(2 * ROWS_AT_ONCE + 5)
    expected = encode_tokens(sample(logits_of(x_BD), decode_draws(draws, len(draws), VOCAB)))
    assert len({token.id for token in expected.tokens}) > 40
    async with head_of() as head:
        together = await head.Sample(SampleRequest(rows=wire.encode(x_BD), draws=draws))
        alone = [
            (await head.Sample(SampleRequest(rows=wire.encode(x_BD[row : row + 1]), draws=[draws[row]]))).tokens[0]
            for row in range(len(draws))
        ]
    assert together == expected
    assert SampleResponse(tokens=alone) == expected


async def test_logits_are_told_only_where_inspection_is_on() -> None:
    x_TD = random_rows(7)
    request = ScoreRequest(rows=wire.encode(x_TD), lengths=tiny.wire_ids(4, 3))
    async with head_of() as head:
        assert (await refusal(head.Score, request))[0] is grpc.StatusCode.FAILED_PRECONDITION
    async with head_of(inspect=True) as head:
        reply = await head.Score(request)
    assert reply.logits.data == logits_of(x_TD).numpy().tobytes()
    assert tuple(reply.logits.shape) == (7, VOCAB)
    assert not reply.HasField("probabilities")


async def test_logits_that_do_not_fit_a_reply_are_refused() -> None:
    async with head_of(inspect=True, max_reply_bytes=2**10 + 5 * 4 * VOCAB) as head:
        await head.Score(ScoreRequest(rows=wire.encode(random_rows(5)), lengths=tiny.wire_ids(5)))
        request = ScoreRequest(rows=wire.encode(random_rows(6)), lengths=tiny.wire_ids(6))
        assert await refusal(head.Score, request) == (grpc.StatusCode.INVALID_ARGUMENT, "rows")


async def test_bad_requests_are_refused_and_the_next_is_answered() -> None:
    rows, draws = wire.encode(random_rows(2)), random_draws(2)
    broken = random_rows(2)
    broken[1, 3] = np.nan
    outside = random_draws(2)
    outside[1].seen.append(VOCAB)
    negative = random_draws(2)
    negative[0].sampling.temperature = -1
    bad = {
        "rows": SampleRequest(rows=wire.encode(broken), draws=draws),
        "draws": SampleRequest(rows=rows, draws=draws[:1]),
        "draws[1].seen": SampleRequest(rows=rows, draws=outside),
        "draws[0].sampling.temperature": SampleRequest(rows=rows, draws=negative),
    }
    async with head_of(inspect=True) as head:
        for field, request in bad.items():
            assert await refusal(head.Sample, request) == (grpc.StatusCode.INVALID_ARGUMENT, field)
            await head.Sample(SampleRequest(rows=rows, draws=draws))
        request = ScoreRequest(rows=rows, lengths=tiny.wire_ids(3))
        assert await refusal(head.Score, request) == (grpc.StatusCode.INVALID_ARGUMENT, "lengths")


async def test_a_head_that_computes_nan_gives_no_token() -> None:
    x_BD = random_rows(3)
    x_BD[1] = np.float32(3e38) * np.where(np.arange(WIDTH) % 2, 1, -1)
    assert not logits_of(x_BD)[1].isfinite().any()
    async with head_of() as head:
        code, _ = await refusal(head.Sample, SampleRequest(rows=wire.encode(x_BD), draws=random_draws(3)))
        assert code is grpc.StatusCode.DATA_LOSS


async def test_a_classifier_has_no_next_token() -> None:
    servicer = ClassifierServicer(tiny.stage("classifier"))
    async with (
        tiny.served((add_ClassifierServiceServicer_to_server, servicer)) as address,
        open_channel(address) as channel,
    ):
        code, _ = await refusal(ClassifierServiceStub(channel).Sample, SampleRequest())
    assert code is grpc.StatusCode.FAILED_PRECONDITION


def offered(*arguments: str) -> ClassifierServiceServicer:
    settings = read_settings(ClassifierSettings, "classifier", arguments, {})
    [servicer] = load(settings, tracing.OFF).servicers
    return servicer.implementation  # type: ignore[no-any-return]


async def test_the_program_offers_what_its_model_and_settings_say() -> None:
    assert isinstance(offered(f"--model={tiny.model()}"), ClassifierServicer)
    plain = offered(f"--model={model()}")
    open_to_all = offered(f"--model={model()}", "--inspect", f"--max-message-bytes={2**10 + 5 * 4 * VOCAB}")
    request = ScoreRequest(rows=wire.encode(random_rows(5)), lengths=tiny.wire_ids(5))
    more = ScoreRequest(rows=wire.encode(random_rows(6)), lengths=tiny.wire_ids(6))
    with pytest.raises(WrongPart):
        await plain.Score(request, None)
    assert await open_to_all.Score(request, None)
    with pytest.raises(InvalidInput):
        await open_to_all.Score(more, None)
