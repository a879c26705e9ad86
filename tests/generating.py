"""A small language model that generates, requests to it of every kind, and what is compared of the answers."""

from __future__ import annotations

import asyncio
import functools
import random
import urllib.request
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc.aio

from expertmesh.checkpoint.sources import open_source
from expertmesh.checkpoint.split import split
from expertmesh.client import Client
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.description_pb2 import DescribeRequest
from expertmesh.v1.description_pb2_grpc import DescriptionServiceStub
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds
from tests import tiny
from tests.up import Up

CHECKPOINTS = Path(__file__).resolve().parent / "fixtures" / "checkpoints"
CONTEXT, VOCAB = 512, 512


@functools.cache
def model(name: str = "mixtral", dtype: str = "") -> Path:
    """A checkpoint of the fixtures, split."""
    folder = tiny.scratch() / name
    split(open_source(CHECKPOINTS / name, dtype or None), folder)
    return folder


def ids(length: int, seed: int = 0) -> list[int]:
    """A random prompt."""
    generator = random.Random(f"{length} {seed}")
    return [generator.randrange(3, VOCAB) for _ in range(length)]


def asked(prompt: Sequence[int] | int, max_tokens: int = 16, **fields: Any) -> GenerateRequest:
    """A request, greedy unless it says otherwise, that goes on after the end token."""
    given = ids(prompt) if isinstance(prompt, int) else list(prompt)
    plain: dict[str, Any] = {"temperature": 0.0, "ignore_end": True, **fields}
    return GenerateRequest(ids=TokenIds(ids=given), max_tokens=max_tokens, **plain)


@functools.cache
def mixed_requests() -> tuple[GenerateRequest, ...]:
    """32 requests of mixed lengths and sampling settings."""
    settings: list[dict[str, Any]] = [
        {},
        {"temperature": 0.9, "seed": 11},
        {"temperature": 1.3, "top_k": 40, "seed": 2**63 + 5},
        {"temperature": 1.0, "top_p": 0.8, "seed": 12},
        {"temperature": 1.0, "min_p": 0.02, "seed": 13},
        {"repetition_penalty": 1.3},
        {"temperature": 0.8, "top_k": 100, "top_p": 0.95, "min_p": 0.001, "repetition_penalty": 1.1, "seed": 14},
        {"temperature": 1.1, "seed": 15, "n": 2},
        {"temperature": 1.5, "seed": 16, "stop": ["e", "zz"]},
        {"temperature": 1.5, "seed": 17, "stop_ids": list(range(3, VOCAB, 9))},
        {"logprobs": 3},
        {"temperature": 1.2, "seed": 18, "logprobs": 0, "ignore_end": False},
        {"temperature": 0.7, "seed": 19, "first_choice": 3, "logprobs": 20},
    ]
    lengths = [1, 2, 3, 7, 17, 64, 65, 127, 128, 129, 200, 300, 400]
    generator = random.Random(3)
    requests = []
    for number in range(32):
        length = lengths[number % len(lengths)] if number < 26 else generator.randrange(1, 300)
        max_tokens = generator.choice([1, 2, 9, 24, 30])
        requests.append(asked(ids(length, number), max_tokens, **settings[(number + number // 13) % len(settings)]))
    return tuple(requests)


@dataclass(frozen=True)
class Answer:
    """What must be the same however it was computed: tokens with their log probabilities, text, and why it ended."""

    tokens: tuple[int, ...]
    logprobs: tuple[tuple[float, tuple[tuple[int, float], ...]], ...]
    text: str
    finish: int


def answer_of(messages: Sequence[pb.GenerateResponse], choice: int = 0) -> Answer:
    """What the messages of a stream say of one choice."""
    mine = [message for message in messages if message.choice == choice]
    drawn = [token for message in mine for token in message.tokens]
    return Answer(
        tuple(token.id for token in drawn),
        tuple((token.logprob, tuple((one.id, one.logprob) for one in token.top)) for token in drawn),
        "".join(message.text for message in mine),
        mine[-1].finish_reason,
    )


def answers_of(response: pb.CompleteResponse) -> list[Answer]:
    """What a whole reply says of every choice."""
    return [
        Answer(
            tuple(token.id for token in choice.tokens),
            tuple((token.logprob, tuple((one.id, one.logprob) for one in token.top)) for token in choice.tokens),
            choice.text,
            choice.finish_reason,
        )
        for choice in response.choices
    ]


async def streamed(client: Client, request: GenerateRequest) -> list[pb.GenerateResponse]:
    """All messages of one stream."""
    async with aclosing(client.generate(request)) as messages:
        return [message async for message in messages]


async def completed(client: Client, requests: Sequence[GenerateRequest], **fields: Any) -> list[list[Answer]]:
    """Answers to requests that are sent at once."""
    return [answers_of(reply) for reply in await asyncio.gather(*(client.complete(one) for one in requests))]


def by_route(request: GenerateRequest, route: pb.Route) -> GenerateRequest:
    """The same request by another route."""
    changed = GenerateRequest(route=route)
    changed.MergeFrom(request)
    changed.route = route
    return changed


async def metrics_of(up: Up, name: str) -> dict[str, float]:
    """The numbers that a process of a mesh gives, by name and labels."""
    async with grpc.aio.insecure_channel(up.processes()[name]["address"]) as channel:
        address = (await DescriptionServiceStub(channel).Describe(DescribeRequest(), timeout=10)).metrics_address
    url = f"http://{address}/metrics" if address else f"{up.http}/metrics"
    text = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=10).read().decode())
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


async def used_blocks(up: Up, *names: str) -> float:
    """Blocks of KV caches that are held at some processes."""
    return sum([(await metrics_of(up, name))['expertmesh_kv_blocks{state="used"}'] for name in names])


async def until(holds: Any, timeout_s: float = 30) -> None:
    """Asks an asynchronous question again and again until the answer is yes."""
    async with asyncio.timeout(timeout_s):
        while not await holds():
            await asyncio.sleep(0.02)
