"""How good the answers are: labels of many texts through one route, the load of every expert, and intervals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expertmesh import wire
from expertmesh.client import Client
from expertmesh.v1.inference_pb2 import CONTRACT_EXACT, CONTRACT_MESH_ONLY, ROUTE_FULL_MODEL, Route

CALL_TEXTS = 64
Z_95 = 1.959964


@dataclass(frozen=True)
class Labelled:
    """What a route gave.

    Attributes:
        labels: The label of each text.
        tokens_LE: Token rows that each expert of each layer served.
    """

    labels: list[str]
    tokens_LE: npt.NDArray[Any]


async def label_texts(client: Client, texts: Sequence[str], route: Route, progress: Callable[[int], None]) -> Labelled:
    """Has many texts classified by one route and no other.

    Args:
        client: A gateway.
        texts: Raw texts.
        route: ROUTE_MESH or ROUTE_FULL_MODEL.
        progress: Is told how many texts are done, after each call.

    Raises:
        MeshError: A call failed.
    """
    contract = CONTRACT_EXACT if route == ROUTE_FULL_MODEL else CONTRACT_MESH_ONLY
    labels: list[str] = []
    tokens_LE: npt.NDArray[Any] = np.zeros((), np.int64)
    for start in range(0, len(texts), CALL_TEXTS):
        chunk = texts[start : start + CALL_TEXTS]
        response = await client.classify(chunk, contract, route, include_experts=True)
        for result in response.results:
            labels.append(result.label)
            shape = tuple(result.expert_tokens.shape)
            tokens_LE = tokens_LE + wire.decode(result.expert_tokens, wire.INT32, shape, "expert_tokens")
        progress(len(labels))
    return Labelled(labels, tokens_LE)


def fair_shares(tokens_LE: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Each expert's part of its layer's tokens, in fair shares: 1 is what it would have if all had the same."""
    shares: npt.NDArray[np.float64] = tokens_LE / tokens_LE.sum(axis=1, keepdims=True) * tokens_LE.shape[1]
    return shares


def wilson_interval(hits: int, total: int, z: float = Z_95) -> tuple[float, float]:
    """The Wilson score interval of a share (Wilson, 1927); the default `z` gives 95 %."""
    share = hits / total
    middle = share + z**2 / (2 * total)
    half = z * (share * (1 - share) / total + z**2 / (4 * total**2)) ** 0.5
    return (middle - half) / (1 + z**2 / total), (middle + half) / (1 + z**2 / total)
