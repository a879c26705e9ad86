"""What is asked: a fixed set of texts or prompts with seeds, and the answers that nobody has disturbed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from struct import pack
from typing import Any

from expertmesh.client import Client
from expertmesh.v1 import inference_pb2 as pb
from expertmesh.v1.inference_pb2 import ClassifyRequest, GenerateRequest

ROOT = Path(__file__).resolve().parents[2]
AGNEWS, TINYTEXT = ROOT / "models" / "agnews", ROOT / "models" / "tinytext"
KINDS = {AGNEWS: "classify", TINYTEXT: "generate"}
_PROMPTS = (
    "ROMEO:",
    "JULIET:\nO ",
    "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\n",
    "KING RICHARD III:\nNow is the winter of our discontent",
    "HAMLET:\nTo be, or not",
    "GLOUCESTER:\nMy lord, the day is cold and we have far to go.",
    "The",
    "LADY MACBETH:\nWhat is it that you",
)
_SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "seed": 11},
    {"temperature": 1.2, "top_k": 40, "seed": 12},
    {"temperature": 1.0, "top_p": 0.8, "repetition_penalty": 1.1, "seed": 13},
)


@dataclass(frozen=True)
class Samples:
    """Requests to draw from.

    Attributes:
        kind: "classify" or "generate".
        requests: They say nothing of contract and route.
        steady: How many of them, from the first on, steady load draws from; bursts draw from the others.
    """

    kind: str
    requests: tuple[ClassifyRequest | GenerateRequest, ...]
    steady: int


def classifications(count: int = 32) -> Samples:
    """Texts of different lengths, some calls with several."""
    lines = (ROOT / "examples" / "headlines.txt").read_text().splitlines()
    texts = [" ".join(lines[(number + more) % len(lines)] for more in range(1 + number % 3)) for number in range(count)]
    requests = [ClassifyRequest(texts=[texts[n], *texts[: n % 4 == 3]]) for n in range(count)]
    return Samples("classify", tuple(requests), count)


def generations(steady: int = 16, max_tokens: int = 16, long: int = 0, long_tokens: int = 96) -> Samples:
    """Prompts with seeds, greedy and drawn: some with short answers for steady load, some with long ones for bursts."""
    requests = []
    for number in range(steady + long):
        settings = _SETTINGS[(number + number // len(_PROMPTS)) % len(_SETTINGS)]
        tokens = max_tokens if number < steady else long_tokens
        prompt = _PROMPTS[number % len(_PROMPTS)]
        request = GenerateRequest(text=prompt, max_tokens=tokens, ignore_end=True, logprobs=0, **settings)
        requests.append(request)
    return Samples("generate", tuple(requests), steady)


def of_model(model: Path) -> Samples:
    """Samples for a bundled model."""
    return classifications() if KINDS[model] == "classify" else generations()


def classified_bits(reply: pb.ClassifyResponse) -> bytes:
    """Logits, probabilities and labels of every text, bit by bit."""
    parts = []
    for result in reply.results:
        numbers = [*result.logits, *result.probabilities]
        parts.append(pack(f"<I{len(numbers)}f", len(numbers), *numbers) + result.label.encode())
    return b"".join(parts)


def token_bits(message: pb.GenerateResponse) -> bytes:
    """Tokens of a message and their log probabilities, bit by bit."""
    return b"".join(pack("<if", token.id, token.logprob) for token in message.tokens)


async def undisturbed(address: str, samples: Samples) -> list[bytes]:
    """The answer to every sample from a mesh that nobody disturbs, by the mesh route; compared with the full model's.

    Raises:
        AssertionError: The two routes differ before anything was broken.
    """
    async with Client(address, timeout_s=120) as client:

        async def ask(request: ClassifyRequest | GenerateRequest, route: pb.Route) -> bytes:
            if isinstance(request, ClassifyRequest):
                contract = pb.CONTRACT_MESH_ONLY if route == pb.ROUTE_MESH else pb.CONTRACT_EXACT
                return classified_bits(await client.classify(list(request.texts), contract, route))
            changed = GenerateRequest()
            changed.CopyFrom(request)
            changed.route = route
            return b"".join([token_bits(message) async for message in client.generate(changed)])

        async def all_by(route: pb.Route) -> list[bytes]:
            return await asyncio.gather(*(ask(request, route) for request in samples.requests))

        by_mesh = await all_by(pb.ROUTE_MESH)
        by_whole = await all_by(pb.ROUTE_FULL_MODEL)
    assert by_mesh == by_whole, "mesh and full model differ before anything was broken"
    return by_mesh
