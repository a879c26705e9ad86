from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest

from expertmesh import wire
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.checkpoint.tokenizer import load_tokenizer
from expertmesh.rpc.channel import open_channel
from expertmesh.rpc.errors import from_call
from expertmesh.serving import tokenizing
from expertmesh.serving.tokenizing import TokenizerServicer
from expertmesh.tokenization.language import LanguageTokenizer
from expertmesh.v1.tensor_pb2 import Tensor
from expertmesh.v1.tokenizer_pb2 import (
    Chat,
    ChatMessage,
    DecodeBatchRequest,
    DecodeRequest,
    EncodePromptRequest,
    EncodeRequest,
)
from expertmesh.v1.tokenizer_pb2_grpc import TokenizerServiceStub, add_TokenizerServiceServicer_to_server
from tests import tiny

CHECKPOINTS = Path(__file__).parent / "fixtures" / "checkpoints"
INVALID = grpc.StatusCode.INVALID_ARGUMENT
WRONG_PART = grpc.StatusCode.FAILED_PRECONDITION
CONTEXT, VOCAB = 200, 520
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.content == 'loop' %}{% for i in range(99999) %}"
    "{% for i in range(99999) %}{% endfor %}{% endfor %}{% endif %}[{{ m.role }}] {{ m.content }}{% endfor %}"
)


def folder_of(family: str, folder: Path, template: str | None = TEMPLATE) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINTS / family / name, folder)
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


@asynccontextmanager
async def served(tokenizer: Any, context: int = CONTEXT, vocab: int = VOCAB) -> AsyncIterator[Any]:
    spec = Manifest.read(tiny.model()).spec
    spec = replace(spec, context=context, embedding=replace(spec.embedding, vocab=vocab))
    async with (
        TokenizerServicer(tokenizer, spec) as servicer,
        tiny.served((add_TokenizerServiceServicer_to_server, servicer), max_message_bytes=2**23) as address,
        open_channel(address) as channel,
    ):
        yield TokenizerServiceStub(channel)


@pytest.fixture
async def stub(tmp_path: Path) -> AsyncIterator[Any]:
    async with served(LanguageTokenizer.load(folder_of("olmoe", tmp_path))) as stub:
        yield stub


@pytest.fixture
def language() -> LanguageTokenizer:
    return LanguageTokenizer.load(CHECKPOINTS / "olmoe")


def ids_of(reply: Any) -> list[int]:
    ids: list[int] = wire.decode(reply.ids, wire.INT32, (None,), "ids").tolist()
    return ids


def chat_of(*messages: tuple[str, str]) -> EncodePromptRequest:
    return EncodePromptRequest(
        chat=Chat(messages=[ChatMessage(role=role, content=content) for role, content in messages])
    )


def batch_of(*sequences: list[int]) -> DecodeBatchRequest:
    return DecodeBatchRequest(
        ids=tiny.wire_ids(*(id_ for sequence in sequences for id_ in sequence)),
        lengths=tiny.wire_ids(*map(len, sequences)),
    )


async def refusal(call: Any, request: Any) -> tuple[grpc.StatusCode, str, str]:
    """Status, field and text of the refusal."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(request, timeout=20)
    error = from_call(caught.value, "tokenizer")
    return caught.value.code(), getattr(error, "field", ""), str(error)


# Prompts.


async def test_a_text_becomes_the_ids_of_the_tokenizer(stub: Any, language: LanguageTokenizer) -> None:
    for text in ("To be, or not 🎉", " ", "\n", "<s>hi</s>"):
        assert ids_of(await stub.EncodePrompt(EncodePromptRequest(text=text))) == language.encode(text)


async def test_a_chat_gets_the_template_and_no_second_start(tmp_path: Path) -> None:
    folder = folder_of("olmoe", tmp_path)
    values = json.loads((folder / "tokenizer.json").read_text())
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    marks = {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}
    values["post_processor"] = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": marks}
    (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = LanguageTokenizer.load(folder)
    async with served(tokenizer) as stub:
        assert ids_of(await stub.EncodePrompt(EncodePromptRequest(text="hi")))[0] == 1
        ids = ids_of(await stub.EncodePrompt(chat_of(("user", "hi"), ("assistant", "yes"))))
    assert ids == tokenizer.encode("<s>[user] hi[assistant] yes", special=False)
    assert ids.count(1) == 1


@pytest.mark.parametrize(
    ("request_", "field", "said"),
    [
        (EncodePromptRequest(), "prompt", "empty"),
        (EncodePromptRequest(text=""), "prompt", "empty"),
        (EncodePromptRequest(chat=Chat()), "messages", "no messages"),
        (EncodePromptRequest(text="🎉" * 60), "prompt", f"240 tokens; the context has {CONTEXT}"),
        (EncodePromptRequest(text="a" * (32 * CONTEXT + 1025)), "prompt", "7425 bytes; at most 7424"),
        (chat_of(("user", "a" * (32 * CONTEXT + 1025))), "prompt", "at most 7424"),
        (chat_of(*[("user", "a")] * 1025), "messages", "at most 1024"),
        (chat_of(("user", "loop")), "messages", "too much time"),
    ],
    ids=["nothing", "empty", "no-messages", "tokens", "bytes", "chat-bytes", "messages", "loop"],
)
async def test_a_prompt_that_cannot_be_is_refused(
    request_: EncodePromptRequest, field: str, said: str, stub: Any
) -> None:
    code, named, details = await refusal(stub.EncodePrompt, request_)
    assert (code, named) == (INVALID, field)
    assert said in details
    assert len(ids_of(await stub.EncodePrompt(EncodePromptRequest(text="still here")))) > 0


async def test_a_prompt_as_long_as_the_context_is_taken(stub: Any) -> None:
    assert len(ids_of(await stub.EncodePrompt(EncodePromptRequest(text="🎉" * (CONTEXT // 4))))) == CONTEXT


async def test_a_prompt_has_a_bound_in_bytes_whatever_the_context(language: LanguageTokenizer) -> None:
    async with served(language, context=2**20) as stub:
        text = "a" * (tokenizing.MAX_PROMPT_BYTES + 1)
        code, field, details = await refusal(stub.EncodePrompt, EncodePromptRequest(text=text))
    assert (code, field) == (INVALID, "prompt")
    assert str(tokenizing.MAX_PROMPT_BYTES) in details


async def test_a_model_without_template_refuses_chats(language: LanguageTokenizer) -> None:
    async with served(language) as stub:
        code, field, details = await refusal(stub.EncodePrompt, chat_of(("user", "hi")))
    assert (code, field) == (INVALID, "messages")
    assert "no chat template" in details


@pytest.mark.parametrize(
    "text", ["a" * 10**6, " " * 10**6, "a\u0301\u0302" * 200_000], ids=["letter", "space", "zalgo"]
)
@pytest.mark.parametrize("family", ["olmoe", "mixtral"])
async def test_a_hostile_text_does_not_hold_up_the_service(family: str, text: str, tmp_path: Path) -> None:
    tokenizer = LanguageTokenizer.load(folder_of(family, tmp_path))
    spec = Manifest.read(tiny.model()).spec
    spec = replace(spec, context=2**20, embedding=replace(spec.embedding, vocab=VOCAB))
    async with TokenizerServicer(tokenizer, spec) as servicer:
        context: Any = None
        call = asyncio.create_task(servicer.EncodePrompt(EncodePromptRequest(text=text), context))
        turns, longest_s, at_s = 0, 0.0, time.monotonic()
        while not call.done():
            await asyncio.sleep(0)
            now_s = time.monotonic()
            turns, longest_s, at_s = turns + 1, max(longest_s, now_s - at_s), now_s
        assert ids_of(await call)
    assert turns > 100
    assert longest_s < 0.3


async def test_a_looping_template_does_not_hold_up_the_service(stub: Any, language: LanguageTokenizer) -> None:
    looping = asyncio.create_task(refusal(stub.EncodePrompt, chat_of(("user", "loop"))))
    await asyncio.sleep(0)
    for _ in range(20):
        reply = await stub.EncodePrompt(EncodePromptRequest(text="to be"), timeout=1)
        assert ids_of(reply) == language.encode("to be")
    assert not looping.done()
    assert (await looping)[0] == INVALID


# Decoding.


async def test_sequences_become_texts(stub: Any, language: LanguageTokenizer) -> None:
    one, other = language.encode("to be 🎉"), language.encode("or not")
    reply = await stub.DecodeBatch(batch_of(one, other, one[:-1], [1], [VOCAB - 1]))
    assert list(reply.texts) == ["to be 🎉", "or not", language.decode([one[:-1]])[0], "", ""]
    assert (await stub.Decode(DecodeRequest(ids=tiny.wire_ids(*one)))).text == "to be 🎉"


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (DecodeBatchRequest(), "ids"),
        (batch_of([VOCAB]), "ids"),
        (batch_of([-1]), "ids"),
        (DecodeBatchRequest(ids=wire.encode(np.zeros(2**16 + 1, np.int32)), lengths=tiny.wire_ids(2**16 + 1)), "ids"),
        (DecodeBatchRequest(ids=tiny.wire_ids(1, 2, 3), lengths=tiny.wire_ids(1, 1)), "lengths"),
        (DecodeBatchRequest(ids=tiny.wire_ids(1, 2, 3), lengths=tiny.wire_ids(3, 0)), "lengths"),
        (DecodeBatchRequest(ids=tiny.wire_ids(1, 2, 3), lengths=tiny.wire_ids(4, -1)), "lengths"),
        (batch_of(*[[5]] * 1025), "lengths"),
        (DecodeBatchRequest(ids=Tensor(dtype=1, shape=[2**62, 8]), lengths=tiny.wire_ids(1)), "ids"),
    ],
)
async def test_sequences_that_cannot_be_are_refused(request_: DecodeBatchRequest, field: str, stub: Any) -> None:
    assert (await refusal(stub.DecodeBatch, request_))[:2] == (INVALID, field)


async def test_sequences_at_their_bounds_are_decoded(stub: Any) -> None:
    assert len((await stub.DecodeBatch(batch_of(*[[5] * 64] * 1024))).texts) == 1024


# Each kind of model has its own call.


async def test_a_language_model_does_not_encode_texts_to_classify(stub: Any) -> None:
    code, _, details = await refusal(stub.Encode, EncodeRequest(texts=["a"]))
    assert code == WRONG_PART
    assert "EncodePrompt" in details


async def test_a_classifier_encodes_no_prompts(stub: Any) -> None:
    manifest = Manifest.read(tiny.model())
    tokenizer = load_tokenizer(tiny.model(), manifest)
    async with served(tokenizer, vocab=manifest.spec.embedding.vocab) as stub:
        assert (await refusal(stub.EncodePrompt, EncodePromptRequest(text="a")))[0] == WRONG_PART
        ids = ids_of(await stub.Encode(EncodeRequest(texts=["stocks rose", "oil"])))
        assert list((await stub.DecodeBatch(batch_of(ids[:-1], ids[-1:]))).texts) != ["", ""]
