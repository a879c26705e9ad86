"""The same token ids through the mesh and the full model, whole, in chunks and token by token.

Everything that both routes show is compared: embeddings, every layer's input, residual, routes, weights and expert
rows, and the logits of every token. What went in chunks has to have the logits of what went whole, too.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from expertmesh import wire
from expertmesh.client import Client
from expertmesh.errors import SetupError, WrongPart
from expertmesh.model.spec import ModelSpec
from expertmesh.v1.inference_pb2 import ROUTE_FULL_MODEL, ROUTE_MESH
from expertmesh.v1.inspection_pb2 import InspectResponse
from expertmesh.v1.tensor_pb2 import Tensor
from expertmesh.verification.tally import Findings, Tally
from expertmesh.verification.traces import array, bits_apart, differing_bits, first_difference

# Tokens that go through the layers at a time.
CHUNKS = {"whole": 0, "chunks of 5": 5, "token by token": 1}
AGAINST_WHOLE = "chunks against whole"
# Around the 128 tokens of a block of the KV cache and twice that; some are short enough to go token by token.
LENGTHS = (1, 2, 5, 31, 129, 6, 64, 127, 128, 200, 257, 300)
SINGLE_TOKENS = 180  # most tokens of all sequences together that go one by one
MESSAGE_BYTES = 60 * 2**20  # of the 64 MiB that a reply may have

Ids = list[int]
Shown = Callable[[InspectResponse, int], None]


def made_up(spec: ModelSpec, seed: int = 0) -> list[Ids]:
    """Sequences of random ids, of lengths around those where computation changes its shape."""
    chance = np.random.default_rng(seed)
    most = most_rows(spec)
    lengths = dict.fromkeys(min(length, most) for length in LENGTHS)
    return [chance.integers(0, spec.embedding.vocab, length).tolist() for length in lengths]


def most_rows(spec: ModelSpec) -> int:
    """The longest sequence whose trace fits a reply, at most the context.

    Raises:
        SetupError: None does.
    """
    width, top_k = spec.width, spec.router.top_k
    sparse = len(spec.sparse_layers)
    numbers = 1 + width + spec.embedding.vocab + 2 * width * spec.layers + sparse * (width + 2 * top_k + width * top_k)
    most = MESSAGE_BYTES // (4 * numbers)
    if not most:
        raise SetupError(f"what inspection shows of one token, {4 * numbers} bytes, does not fit a reply")
    return min(spec.context, most)


async def compare_sequences(
    client: Client,
    sequences: Sequence[Ids],
    single_tokens: int,
    callers: int,
    progress: Callable[[], None],
    shown: Shown = lambda trace, index: None,
) -> Findings:
    """Sends sequences through both routes.

    Args:
        client: A gateway whose mesh and full model have inspection on.
        sequences: Token ids.
        single_tokens: About so many tokens go one by one, those of whole sequences.
        callers: Sequences under way at once.
        progress: Is told that one sequence is done.
        shown: Is shown the mesh's trace of each whole sequence, with its index.

    Raises:
        MeshError: A call failed.
    """
    findings = Findings({name: Tally(name) for name in (*CHUNKS, AGAINST_WHOLE)})
    single = singles(sequences, single_tokens)
    indices: Iterator[int] = iter(range(len(sequences)))

    async def caller() -> None:
        for index in indices:
            logits: Tensor | None = None
            for name, chunk in CHUNKS.items():
                if chunk == 1 and index not in single:
                    continue
                trace = await _compare(client, index, sequences[index], name, findings)
                if logits is None:
                    logits = trace.logits
                    shown(trace, index)
                else:
                    against = findings.tally(AGAINST_WHOLE)
                    against.add(len(sequences[index]), *logits_apart(trace.logits, logits))
            progress()

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(caller())
    except* WrongPart:
        findings = Findings(was_inspected=False)
    return findings


async def _compare(client: Client, index: int, ids: Ids, setting: str, findings: Findings) -> InspectResponse:
    chunk = CHUNKS[setting]
    mesh = await client.inspect_ids(ids, ROUTE_MESH, chunk)
    full = await client.inspect_ids(ids, ROUTE_FULL_MODEL, chunk)
    bits = differing_bits(mesh, full)
    findings.tally(setting).add(len(ids), bits, logits_apart(mesh.logits, full.logits)[1])
    if bits and findings.first is None:
        subject = f"sequence {index} of {len(ids)} tokens, {setting}"
        findings.first = first_difference(subject, mesh, full, -(-len(ids) // (chunk or len(ids))))
    return mesh


def logits_apart(left: Tensor, right: Tensor) -> tuple[int, float]:
    """How many bits of two arrays of logits differ, and the largest absolute difference."""
    bits = bits_apart(left.data, right.data)
    if not bits:
        return 0, 0.0
    if list(left.shape) != list(right.shape):
        return bits, float("inf")
    return bits, float(np.abs(array(left, wire.FLOAT32) - array(right, wire.FLOAT32)).max())


def singles(sequences: Sequence[Ids], most_tokens: int) -> set[int]:
    """Indices of those that go token by token: as many as fit, and the shortest if none does."""
    chosen: set[int] = set()
    for index, ids in enumerate(sequences):
        if sum(len(sequences[other]) for other in chosen) + len(ids) <= most_tokens:
            chosen.add(index)
    return chosen or {min(range(len(sequences)), key=lambda index: len(sequences[index]))}
