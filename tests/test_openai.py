from __future__ import annotations

import time
from typing import Any

import pytest

from expertmesh.v1 import inference_pb2 as pb
from tests.doubles.scripted import PROFILE, Scripted, said
from tests.openai_gateway import MODEL, events, http_client, openai_client

STOP, LENGTH = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH


async def test_a_completion_tells_everything() -> None:
    double = Scripted()
    async with openai_client(double) as client:
        reply = await client.completions.create(model=MODEL, prompt="Say", max_tokens=4, temperature=0, seed=7)
    assert reply.id.startswith("cmpl-")
    assert (reply.object, reply.model, reply.system_fingerprint) == ("text_completion", MODEL, PROFILE.split()[-1])
    (choice,) = reply.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, "Hello!", "stop", None)
    assert reply.usage is not None
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens, reply.usage.total_tokens) == (5, 4, 9)
    assert reply.model_extra is not None
    assert reply.model_extra["expertmesh"] == {"route": "mesh", "exact": True, "profile": PROFILE, "seed": 7}
    assert abs(reply.created - time.time()) < 60


async def test_what_is_asked_arrives_as_the_contract_has_it() -> None:
    double = Scripted()
    async with openai_client(double) as client:
        await client.completions.create(
            model=MODEL,
            prompt="Say",
            max_tokens=3,
            temperature=0.5,
            top_p=0.25,
            n=1,
            best_of=1,
            stop=["\n", "END"],
            seed=2**64 - 1,
            logprobs=2,
            user="me",
            extra_body={
                "top_k": 5,
                "min_p": 0.125,
                "repetition_penalty": 1.5,
                "stop_token_ids": [3, 4],
                "ignore_eos": True,
                "contract": "mesh-only",
                "route": "mesh",
                "timeout_s": 12,
            },
        )
    (request,) = double.requests
    assert request == pb.GenerateRequest(
        text="Say",
        max_tokens=3,
        temperature=0.5,
        top_p=0.25,
        top_k=5,
        min_p=0.125,
        repetition_penalty=1.5,
        n=1,
        stop=["\n", "END"],
        stop_ids=[3, 4],
        ignore_end=True,
        seed=2**64 - 1,
        logprobs=2,
        contract=pb.CONTRACT_MESH_ONLY,
        route=pb.ROUTE_MESH,
    )
    assert 10 < double.timeouts_s[0] <= 12


async def test_defaults_are_openais() -> None:
    double = Scripted()
    async with openai_client(double) as client:
        await client.completions.create(model=MODEL, prompt="Say")
        await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Say"}])
    text, chat = double.requests
    assert text.max_tokens == 16
    assert not chat.HasField("max_tokens")
    for request in (text, chat):
        assert not request.HasField("temperature")
        assert not request.HasField("seed")
        assert not request.HasField("logprobs")
        assert (request.n, request.contract, request.route) == (1, pb.CONTRACT_EXACT, pb.ROUTE_MESH)


async def test_a_stream_of_a_completion() -> None:
    async with openai_client(Scripted()) as client:
        stream = await client.completions.create(
            model=MODEL, prompt="Say", stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    *pieces, last = chunks
    assert [piece.choices[0].text for piece in pieces] == ["Hel", "lo", "!"]
    assert [piece.choices[0].finish_reason for piece in pieces] == [None, None, "stop"]
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert {chunk.system_fingerprint for chunk in chunks} == {PROFILE.split()[-1]}
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 9
    assert all(piece.usage is None for piece in pieces)
    assert pieces[-1].model_extra is not None
    assert pieces[-1].model_extra["expertmesh"]["exact"] is True
    assert "expertmesh" not in (pieces[0].model_extra or {})


async def test_a_chat_completion_and_its_stream() -> None:
    double = Scripted()
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Say "}, {"type": "text", "text": "hello"}]},
    ]
    async with openai_client(double) as client:
        reply = await client.chat.completions.create(model=MODEL, messages=messages, max_completion_tokens=9)
        stream = await client.chat.completions.create(model=MODEL, messages=messages, max_tokens=9, stream=True)
        chunks = [chunk async for chunk in stream]
    assert reply.object == "chat.completion"
    assert reply.id.startswith("chatcmpl-")
    assert (reply.choices[0].message.role, reply.choices[0].message.content) == ("assistant", "Hello!")
    assert reply.choices[0].finish_reason == "stop"
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "Hello!"
    assert chunks[-1].choices[0].finish_reason == "stop"
    for request in double.requests:
        assert request.max_tokens == 9
        assert [(message.role, message.content) for message in request.chat.messages] == [
            ("system", "Be brief."),
            ("user", "Say hello"),
        ]


async def test_a_reply_can_be_sent_back_as_a_message() -> None:
    double = Scripted()
    async with openai_client(double) as client:
        reply = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "Say"}])
        answer: Any = reply.choices[0].message
        again: Any = [{"role": "user", "content": "Say"}, answer.model_dump(), {"role": "user", "content": "More"}]
        await client.chat.completions.create(model=MODEL, messages=again)
        await client.chat.completions.create(model=MODEL, messages=[again[0], answer, again[2]])
    for request in double.requests[1:]:
        assert [message.content for message in request.chat.messages] == ["Say", "Hello!", "More"]


async def test_two_choices_keep_their_numbers() -> None:
    double = Scripted(
        said("a", choice=0, ids=[1]),
        said("x", choice=1, ids=[2]),
        said("y", choice=1, ids=[3], finish=STOP, exact=False, route=pb.ROUTE_FULL_MODEL),
        said("b", choice=0, ids=[4], finish=LENGTH),
        said(usage=pb.Usage(prompt_tokens=1, completion_tokens=4)),
    )
    async with openai_client(double) as client:
        stream = await client.completions.create(model=MODEL, prompt="Say", n=2, stream=True)
        chunks = [chunk async for chunk in stream]
    texts = {0: "", 1: ""}
    for chunk in chunks:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {0: "ab", 1: "xy"}
    ends = {chunk.choices[0].index: chunk for chunk in chunks if chunk.choices[0].finish_reason}
    assert {index: end.choices[0].finish_reason for index, end in ends.items()} == {0: "length", 1: "stop"}
    told = {index: (end.model_extra or {})["expertmesh"] for index, end in ends.items()}
    assert (told[0]["route"], told[0]["exact"]) == ("mesh", True)
    assert (told[1]["route"], told[1]["exact"]) == ("full-model", False)


@pytest.mark.parametrize("stream", [False, True])
async def test_experts_that_were_missing_are_told(stream: bool) -> None:
    missing = [pb.ExpertId(layer=1, expert=3), pb.ExpertId(layer=0, expert=3)]
    double = Scripted(
        said("a", ids=[1]),
        said("b", ids=[2], finish=LENGTH, route=pb.ROUTE_DEGRADED, exact=False, missing_experts=missing),
    )
    async with http_client(double) as http:
        reply = await http.post("/v1/completions", json={"prompt": "Say", "stream": stream, "contract": "degraded-ok"})
        told = (
            [one["expertmesh"] for one in await events(reply) if "expertmesh" in one]
            if stream
            else [reply.json()["expertmesh"]]
        )
    assert double.requests[0].contract == pb.CONTRACT_DEGRADED_OK
    assert [(one["route"], one["exact"]) for one in told] == [("degraded", False)]
    assert told[0]["missing_experts"] == [{"layer": 0, "expert": 3}, {"layer": 1, "expert": 3}]


@pytest.mark.parametrize("stream", [False, True])
async def test_choices_of_several_prompts_are_numbered_through(stream: bool) -> None:
    double = Scripted(
        said("a", choice=0, ids=[1], finish=STOP),
        said("b", choice=1, ids=[2], finish=STOP, usage=pb.Usage(prompt_tokens=3, completion_tokens=2)),
    )
    body = {"prompt": ["one", [4, 5], "three"], "n": 2, "stream": stream}
    if stream:
        body["stream_options"] = {"include_usage": True}
    async with http_client(double) as http:
        reply = await http.post("/v1/completions", json=body)
    assert [request.WhichOneof("prompt") for request in double.requests] == ["text", "ids", "text"]
    assert list(double.requests[1].ids.ids) == [4, 5]
    assert len({request.seed for request in double.requests}) == 1
    if stream:
        *pieces, last, done = await events(reply)
        assert done == "data: [DONE]"
        choices = [piece["choices"][0] for piece in pieces]
    else:
        last = reply.json()
        choices = last["choices"]
        assert [choice["index"] for choice in choices] == list(range(6))
    assert {choice["index"]: choice["text"] for choice in choices} == dict(enumerate("ababab"))
    assert last["usage"] == {"prompt_tokens": 9, "completion_tokens": 6, "total_tokens": 15}


async def test_logprobs_of_a_completion() -> None:
    async with openai_client(Scripted()) as client:
        reply = await client.completions.create(model=MODEL, prompt="Say", logprobs=2)
        stream = await client.completions.create(model=MODEL, prompt="Say", logprobs=2, stream=True)
        told = [chunk.choices[0].logprobs async for chunk in stream]
        without = await client.completions.create(model=MODEL, prompt="Say", logprobs=0)
    whole = reply.choices[0].logprobs
    assert whole is not None
    assert whole.tokens == ["Hel", "l", "o", "!"]
    assert whole.token_logprobs == pytest.approx([-0.1, -0.2, -0.3, -0.4])
    assert whole.text_offset == [0, 3, 4, 5]
    assert whole.top_logprobs is not None
    assert whole.top_logprobs[0] == pytest.approx({"Hel": -0.1, "l": -1.1})
    assert [offset for piece in told for offset in piece.text_offset] == [0, 3, 4, 5]  # type: ignore[union-attr]
    assert [token for piece in told for token in piece.tokens] == whole.tokens  # type: ignore[union-attr]
    assert without.choices[0].logprobs is not None
    assert without.choices[0].logprobs.top_logprobs is None


async def test_logprobs_of_a_chat() -> None:
    infinite = said("Hel", ids=[1, 9], finish=STOP)
    infinite.tokens[0].logprob = float("-inf")
    async with openai_client(Scripted(infinite)) as client:
        messages: Any = [{"role": "user", "content": "Say"}]
        reply = await client.chat.completions.create(model=MODEL, messages=messages, logprobs=True, top_logprobs=1)
    assert reply.choices[0].logprobs is not None
    first, second = reply.choices[0].logprobs.content or ()
    assert (first.token, first.logprob, first.bytes) == ("Hel", -9999.0, [72, 101, 108])
    assert [top.token for top in first.top_logprobs] == ["Hel"]
    assert (second.token, second.bytes) == ("\ufffd", None)
