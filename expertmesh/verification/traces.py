"""Two traces of one input: how many bits differ, and where the first of them does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from expertmesh import wire
from expertmesh.v1.inspection_pb2 import InspectResponse, LayerTrace
from expertmesh.v1.tensor_pb2 import Tensor


@dataclass(frozen=True)
class Difference:
    """Where two routes part.

    Attributes:
        subject: What went through both, as in "text 3".
        stage: "tokenizer", "embedding", "gating", "expert", "combine", "classifier", or "" if it was not seen again.
        layer: The layer, if the stage has one.
        expert: The expert, if it is one.
    """

    subject: str
    stage: str
    layer: int | None = None
    expert: int | None = None

    def __str__(self) -> str:
        """Names the place for people."""
        if not self.stage:
            return f"{self.subject}: the answers differed, but not when both routes were inspected"
        where = "" if self.layer is None else f" of layer {self.layer}"
        name = self.stage if self.expert is None else f"expert {self.expert}"
        return f"{self.subject}: {name}{where}"


def first_difference(subject: str, mesh: InspectResponse, full: InspectResponse, chunks: int = 1) -> Difference:
    """Compares two traces of one input in the order of a request.

    Args:
        subject: What the input is called.
        mesh: One trace.
        full: The other.
        chunks: In how many chunks both went through the layers.
    """
    if not _same(mesh.ids, full.ids):
        return Difference(subject, "tokenizer")
    if not _same(mesh.embedded, full.embedded):
        return Difference(subject, "embedding")
    for layer, (left, right) in enumerate(zip(mesh.layers, full.layers, strict=True)):
        if not _same(left.input, right.input):
            return Difference(subject, "combine", layer - 1)
        for given, expected in (
            (left.residual, right.residual),
            (left.expert_input, right.expert_input),
            (left.expert_ids, right.expert_ids),
            (left.weights, right.weights),
        ):
            if not _same(given, expected):
                return Difference(subject, "gating", layer)
        expert = _differing_expert(left, right, chunks)
        if expert is not None:
            return Difference(subject, "expert", layer, expert)
    return Difference(subject, "" if _same(mesh.logits, full.logits) else "classifier")


def differing_bits(mesh: InspectResponse, full: InspectResponse) -> int:
    """How many bits differ in everything that two traces show."""
    if len(mesh.layers) != len(full.layers):
        return max(1, 8 * abs(mesh.ByteSize() - full.ByteSize()))
    return sum(_tensor_bits(left, right) for left, right in zip(_tensors(mesh), _tensors(full), strict=True))


def bits_apart(left: bytes, right: bytes) -> int:
    """How many bits differ; of what one has more than the other, all."""
    if left == right:
        return 0
    common = min(len(left), len(right))
    ours, theirs = (np.frombuffer(data[:common], np.uint8) for data in (left, right))
    return int(np.unpackbits(ours ^ theirs).sum()) + 8 * abs(len(left) - len(right))


def array(tensor: Tensor, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """A traced array.

    Raises:
        InvalidInput: It is not of that dtype, or its size is not that of its shape.
    """
    return wire.decode(tensor, dtype, tuple(tensor.shape), "trace")


def _tensors(trace: InspectResponse) -> Iterator[Tensor]:
    yield from (trace.ids, trace.embedded, trace.logits)
    for layer in trace.layers:
        yield from (layer.input, layer.residual, layer.expert_input, layer.expert_ids, layer.weights)
        yield from (layer.expert_rows, layer.expert_counts)


def _tensor_bits(left: Tensor, right: Tensor) -> int:
    return 0 if _same(left, right) else max(1, bits_apart(left.data, right.data))


def _differing_expert(left: LayerTrace, right: LayerTrace, chunks: int) -> int | None:
    if not left.expert_counts.data or _same(left.expert_rows, right.expert_rows):
        return None
    counts = array(left.expert_counts, wire.INT32)
    rows_ND, reference_ND = array(left.expert_rows, wire.FLOAT32), array(right.expert_rows, wire.FLOAT32)
    differs_N = (rows_ND.view(np.uint32) != reference_ND.view(np.uint32)).any(axis=1)
    run = int(np.searchsorted(np.cumsum(counts), int(differs_N.argmax()), side="right"))
    return run % (len(counts) // chunks)


def _same(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and list(left.shape) == list(right.shape) and left.data == right.data
