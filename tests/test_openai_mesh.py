"""OpenAI's own client, and plain curl, against a mesh as `expertmesh up` starts it."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from expertmesh.checkpoint.split import split
from tests.up import Up

FIXTURE = Path(__file__).parent / "fixtures" / "checkpoints" / "mixtral"
TEMPLATE = "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}[assistant]"
PROMPT = "The router sends the hidden state"


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    folder = tmp_path_factory.mktemp("openai")
    shutil.copytree(FIXTURE, folder / "tiny-mixtral")
    (folder / "tiny-mixtral" / "chat_template.jinja").write_text(TEMPLATE)
    split(folder / "tiny-mixtral", folder / "split")
    with Up(folder / "split", "--expert-services", "2") as up:
        yield up


@pytest.fixture
async def client(mesh: Up) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{mesh.http}/v1", api_key="none", max_retries=0) as opened:
        yield opened


async def test_completions_whole_and_streamed_are_the_same(client: AsyncOpenAI) -> None:
    (model,) = (await client.models.list()).data
    assert model.id == "tiny-mixtral"
    wanted = {"model": model.id, "prompt": PROMPT, "max_tokens": 24, "seed": 5}
    whole = await client.completions.create(**wanted)
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    pieces = [piece async for piece in await client.completions.create(**wanted, stream=True)]
    assert "".join(piece.choices[0].text for piece in pieces) == whole.choices[0].text
    assert len(pieces) > 5


async def test_chat_goes_through_the_checkpoints_template(client: AsyncOpenAI) -> None:
    messages = [{"role": "user", "content": PROMPT}]
    wanted = {"model": "tiny-mixtral", "max_tokens": 12, "temperature": 0}
    chat = await client.chat.completions.create(**wanted, messages=messages)
    plain = await client.completions.create(**wanted, prompt=f"[user] {PROMPT}\n[assistant]")
    assert chat.choices[0].message.role == "assistant"
    assert chat.usage is not None
    assert plain.usage is not None
    assert chat.usage.prompt_tokens == plain.usage.prompt_tokens
    assert chat.choices[0].message.content == plain.choices[0].text
    stream = await client.chat.completions.create(
        **wanted, messages=messages, stream=True, stream_options={"include_usage": True}
    )
    pieces = [piece async for piece in stream]
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == chat.choices[0].message.content
    assert pieces[-1].usage == chat.usage


async def test_choices_stops_and_logprobs(client: AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model="tiny-mixtral", prompt=PROMPT, max_tokens=10, n=3, seed=1, logprobs=2, temperature=1
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({choice.text for choice in answer.choices}) == 3
    for choice in answer.choices:
        assert choice.logprobs is not None
        assert len(choice.logprobs.token_logprobs or ()) == 10
    text = answer.choices[0].text
    stop = next(mark for mark in text if mark.isalnum())
    cut = await client.completions.create(
        model="tiny-mixtral", prompt=PROMPT, max_tokens=10, n=1, seed=1, temperature=1, stop=[stop]
    )
    assert cut.choices[0].text == text[: text.index(stop)]
    assert cut.choices[0].finish_reason == "stop"


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl here")
def test_plain_curl(mesh: Up) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 8, "seed": 2, "stream": True})
    command = ["curl", "--silent", "--no-buffer", f"{mesh.http}/v1/completions", "--data", body]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.splitlines()
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    streamed = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    body = json.dumps({"prompt": PROMPT, "max_tokens": 8, "seed": 2})
    command = ["curl", "--silent", f"{mesh.http}/v1/completions", "--data", body]
    whole = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert whole["choices"][0]["text"] == streamed
    assert whole["expertmesh"]["route"] == "mesh"
    assert whole["expertmesh"]["exact"] is True
