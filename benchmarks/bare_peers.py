"""Processes that each hold one stage of a model behind a bare socket, and whoever asks them: nothing is served here.

No event loop, no message format, no check, no deadline, no retry, no metric: a frame is its numbers and the arrays.
What is left is the model in processes of its own.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from struct import Struct
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.forked import forked
from expertmesh.checkpoint.load import StageLoader
from expertmesh.dispatch import Applied, ApplyExperts, Embed, Gate, Gated, Score, Scores, StageCall
from expertmesh.model.arrays import to_arrays
from expertmesh.model.cache import BLOCK_TOKENS, KeyValueCache, blocks_of
from expertmesh.model.cached_sequences import CachedSequences
from expertmesh.model.sequences import Sequences
from expertmesh.model.spec import ModelSpec
from expertmesh.model.tiles import Span

Array = npt.NDArray[Any]
Stage = Callable[[int, list[memoryview]], Sequence[Array]]  # layer and arrays to arrays

MOST_ARRAYS = 4
BUFFER_BYTES = 2**24
_HEAD = Struct(f"<I{MOST_ARRAYS}I")  # layer, and the bytes of every array


class Peer:
    """One end of a socket, at which frames are sent and received, one after another."""

    def __init__(self, own: socket.socket) -> None:
        self._socket = own
        self._view = memoryview(bytearray(BUFFER_BYTES))

    def send(self, layer: int, *arrays: Array) -> None:
        """Sends a frame."""
        sizes = [array.nbytes for array in arrays] + [0] * (MOST_ARRAYS - len(arrays))
        self._socket.sendall(b"".join([_HEAD.pack(layer, *sizes), *(array.tobytes() for array in arrays)]))

    def receive(self) -> tuple[int, list[memoryview]]:
        """Layer and arrays of the next frame, which are there until the one after it is received.

        Raises:
            EOFError: Nobody is there any more.
        """
        self._fill(self._view[: _HEAD.size])
        layer, *sizes = _HEAD.unpack_from(self._view)
        ends = np.cumsum(sizes)
        frame = self._view[: int(ends[-1])]
        self._fill(frame)
        return layer, [frame[end - size : end] for end, size in zip(ends.tolist(), sizes, strict=True)]

    def _fill(self, view: memoryview) -> None:
        while view:
            count = self._socket.recv_into(view)
            if not count:
                raise EOFError
            view = view[count:]


@contextmanager
def peers(stages: Sequence[Callable[[], Stage]]) -> Iterator[list[Peer]]:
    """A process for each stage, with one thread."""
    with forked([partial(_answer, make) for make in stages]) as sockets:
        yield [Peer(one) for one in sockets]


def _answer(make: Callable[[], Stage], own: socket.socket) -> None:
    torch.set_num_threads(1)
    peer, stage = Peer(own), make()
    with torch.inference_mode(), suppress(EOFError):
        while True:
            layer, arrays = peer.receive()
            peer.send(layer, *stage(layer, arrays))


class BareMesh:
    """Answers stage calls by asking peers; steps of generating see zeros where a cache would have keys.

    Args:
        spec: The model.
        asked: Of embedding, gating, head and every expert, as `stages_of` has them.
    """

    def __init__(self, spec: ModelSpec, asked: Sequence[Peer]) -> None:
        self._spec = spec
        self._embedding, self._gating, self._head, *self._experts = asked
        self.positions_B: Array | None = None  # of the rows of a step

    def answer(self, call: StageCall) -> Any:
        """Answers one call."""
        width, top_k = self._spec.width, self._spec.router.top_k
        match call:
            case Embed(ids_T, lengths_B):
                self._embedding.send(0, ids_T, lengths_B)
                return _rows(self._embedding.receive()[1][0], np.float32, width).copy()
            case Gate(layer, x_TD, lengths_B):
                self._gating.send(layer, x_TD, lengths_B if self.positions_B is None else self.positions_B)
                residual, given, ids, weights = self._gating.receive()[1]
                return Gated(
                    _rows(residual, np.float32, width),
                    _rows(given, np.float32, width),
                    _rows(ids, np.int64, top_k),
                    _rows(weights, np.float32, top_k),
                )
            case ApplyExperts(layer, rows_ND):
                return Applied(self._apply(call, layer, rows_ND))
            case Score(x_TD, lengths_B):
                self._head.send(0, x_TD, lengths_B)
                return Scores(self._head.receive()[1][0], None)

    def _apply(self, call: ApplyExperts, layer: int, rows_ND: Array) -> Array:
        work = call.slices()
        for expert, rows in work:
            self._experts[expert].send(layer, rows_ND[rows])
        out_ND = np.empty_like(rows_ND)
        for expert, rows in work:
            out_ND[rows] = _rows(self._experts[expert].receive()[1][0], np.float32, self._spec.width)
        return out_ND


def stages_of(folder: Path) -> list[Callable[[], Stage]]:
    """Embedding, gating, head and every expert of a split model, each to be made in its own process."""
    spec = StageLoader(folder, torch.device("cpu")).spec
    experts = [lambda expert=expert: _expert(folder, expert) for expert in range(spec.router.experts)]
    return [lambda: _embedding(folder), lambda: _gating(folder), lambda: _head(folder), *experts]


def _embedding(folder: Path) -> Stage:
    embedding = StageLoader(folder, torch.device("cpu")).embedding()

    def stage(layer: int, arrays: list[memoryview]) -> Sequence[Array]:
        return to_arrays(embedding(_tensor(arrays[0], torch.int64), Sequences(_tensor(arrays[1], torch.int64))))

    return stage


def _gating(folder: Path) -> Stage:
    loader = StageLoader(folder, torch.device("cpu"))
    layers = [loader.gating(layer) for layer in range(loader.spec.layers)]
    layout = Layout(loader)

    def stage(layer: int, arrays: list[memoryview]) -> Sequence[Array]:
        x_TD = _tensor(arrays[0], torch.float32).view(-1, loader.spec.width)
        gated = layers[layer](x_TD, layout.of(layer, _tensor(arrays[1], torch.int64)))
        return to_arrays(gated.residual_TD, gated.expert_input_TD, gated.expert_ids_TK, gated.weights_TK)

    return stage


def _expert(folder: Path, expert: int) -> Stage:
    loader = StageLoader(folder, torch.device("cpu"))
    layers = [loader.expert(layer, expert) for layer in range(loader.spec.layers)]

    def stage(layer: int, arrays: list[memoryview]) -> Sequence[Array]:
        return to_arrays(layers[layer](_tensor(arrays[0], torch.float32).view(-1, loader.spec.width)))

    return stage


def _head(folder: Path) -> Stage:
    loader = StageLoader(folder, torch.device("cpu"))
    head: Any = loader.classifier()

    def stage(layer: int, arrays: list[memoryview]) -> Sequence[Array]:
        x_TD = _tensor(arrays[0], torch.float32).view(-1, loader.spec.width)
        if loader.spec.generates:
            return to_arrays(head(x_TD).argmax(dim=1))
        return to_arrays(head(x_TD, Sequences(_tensor(arrays[1], torch.int64))).logits_BC)

    return stage


class Layout:
    """How the rows of a pass lie: whole sequences, or one row of each behind a cache of zeros; the same in all layers.

    Args:
        loader: Of the model.
    """

    def __init__(self, loader: StageLoader) -> None:
        self._loader = loader
        self._cache: KeyValueCache | None = None
        self._now: Sequences

    def of(self, layer: int, told_B: torch.Tensor) -> Sequences:
        """The layout of what a layer is given, told by positions of rows, or else by lengths of sequences."""
        if layer == 0:
            self._now = self._cached(told_B.tolist()) if self._loader.spec.generates else Sequences(told_B)
        return self._now

    def _cached(self, positions: Sequence[int]) -> Sequences:
        spec, device = self._loader.spec, torch.device("cpu")
        blocks = blocks_of(spec.context)
        if self._cache is None or self._cache.blocks < len(positions) * blocks:
            self._cache, self._rotary = KeyValueCache(spec, len(positions) * blocks, device), self._loader.rotary()
        firsts = range(0, len(positions) * blocks, blocks)
        spans = [
            Span(range(first, first + position // BLOCK_TOKENS + 1), position, 1)
            for first, position in zip(firsts, positions, strict=True)
        ]
        return CachedSequences(spans, self._cache, self._rotary, device)


def _tensor(view: memoryview, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(view, dtype=dtype)


def _rows(view: memoryview, dtype: npt.DTypeLike, columns: int) -> Array:
    return np.frombuffer(view, dtype).reshape(-1, columns)
