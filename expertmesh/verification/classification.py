"""The same texts through the mesh and the full model of a classifier, compared bit by bit.

Where two answers differ, both routes are inspected layer by layer, so that the first place where they part is named.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from expertmesh.client import Client
from expertmesh.errors import WrongPart
from expertmesh.v1.inference_pb2 import CONTRACT_MESH_ONLY, ROUTE_FULL_MODEL, ROUTE_MESH, ClassifyResponse
from expertmesh.verification.traces import Difference, first_difference

Bits = npt.NDArray[np.uint32]


@dataclass
class Comparison:
    """What comparing gave.

    Attributes:
        texts: How many were compared.
        differing: Indices of those whose logits or probabilities differ in any bit.
        largest: Largest absolute difference of a logit.
        inexact: How many answers of the mesh said that they are not exact.
        first: Where the first differing text parts; None if none differs or inspection is off.
    """

    texts: int
    differing: list[int]
    largest: float
    inexact: int
    first: Difference | None = None


async def compare(
    client: Client, texts: Sequence[str], call_texts: int, callers: int, progress: Callable[[int], None]
) -> Comparison:
    """Sends texts through both routes.

    Args:
        client: A gateway.
        texts: Raw texts.
        call_texts: Texts in one call.
        callers: Calls under way at once.
        progress: Is told how many texts are done, after each call.

    Raises:
        MeshError: A call failed.
    """
    result = Comparison(0, [], 0.0, 0)
    starts: Iterator[int] = iter(range(0, len(texts), call_texts))

    async def caller() -> None:
        for start in starts:
            chunk = texts[start : start + call_texts]
            mesh = await client.classify(chunk, contract=CONTRACT_MESH_ONLY, route=ROUTE_MESH)
            full = await client.classify(chunk, route=ROUTE_FULL_MODEL)
            _compare(start, mesh, full, result)
            progress(result.texts)

    async with asyncio.TaskGroup() as group:
        for _ in range(callers):
            group.create_task(caller())
    if result.differing:
        result.differing.sort()
        result.first = await locate(client, result.differing[0], texts[result.differing[0]])
    return result


def _compare(start: int, mesh: ClassifyResponse, full: ClassifyResponse, result: Comparison) -> None:
    for index, (left, right) in enumerate(zip(mesh.results, full.results, strict=True), start=start):
        logits, reference = np.array(left.logits, np.float32), np.array(right.logits, np.float32)
        probabilities, expected = np.array(left.probabilities, np.float32), np.array(right.probabilities, np.float32)
        same = np.array_equal(_bits(logits), _bits(reference)) and np.array_equal(_bits(probabilities), _bits(expected))
        result.texts += 1
        result.inexact += not left.exact
        if not same:
            result.differing.append(index)
            result.largest = max(result.largest, float(np.abs(logits - reference).max()))


async def locate(client: Client, index: int, text: str) -> Difference | None:
    """Finds where the two routes part on one text; None where inspection is switched off."""
    try:
        mesh = await client.inspect(text, ROUTE_MESH)
        full = await client.inspect(text, ROUTE_FULL_MODEL)
    except WrongPart:
        return None
    return first_difference(f"text {index}", mesh, full)


def _bits(array: npt.NDArray[np.float32]) -> Bits:
    return array.view(np.uint32)
