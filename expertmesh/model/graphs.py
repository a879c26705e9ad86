"""CUDA graphs: what is computed for few rows, recorded once for each number of rows and replayed as one launch.

Only functions whose rows do not depend on their company are recorded, so rows are padded to one of a few numbers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

BUCKETS = (16, 64, 256)  # numbers of rows that are recorded
MOST_GRAPHS = 512

Function = Callable[..., tuple[Tensor, ...]]


def padded(rows: int) -> int:
    """How many rows are computed in place of `rows`; 0 if they are too many to be recorded."""
    return next((bucket for bucket in BUCKETS if rows <= bucket), 0)


class Graphs:
    """Recordings of pure functions, of which the one that was used the longest ago gives way to a new one.

    Args:
        most: How many there may be.
    """

    def __init__(self, most: int = MOST_GRAPHS) -> None:
        self._most = most
        self._recordings: OrderedDict[Hashable, _Recording] = OrderedDict()
        self._pool: Any = None

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._recordings)

    def run(
        self, function: Function, rows_ND: Tensor, *others: Tensor, fixed: tuple[Hashable, ...] = ()
    ) -> tuple[Tensor, ...]:
        """Gives `function(rows_ND, *others, *fixed)`; the first time for a padded number of rows it is recorded.

        Args:
            function: Its results have a row for each of `rows_ND`, which does not depend on the other rows. It must not
                wait for the device, and what it reads besides must stay where it is, weights for instance.
            rows_ND: Rows, padded here to the next of `BUCKETS`; more than the last are computed as they are.
            others: Whatever else it takes, on the device; a shape of its own is a recording of its own.
            fixed: What it takes that is no tensor; another one is a recording of its own.
        """
        rows = padded(len(rows_ND))
        if not rows or not rows_ND.is_cuda:
            return function(rows_ND, *others, *fixed)
        key = (function, fixed, rows, rows_ND.shape[1:], rows_ND.dtype, tuple((x.shape, x.dtype) for x in others))
        recording = self._recordings.get(key)
        if recording is None:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            recording = _Recording(function, rows, (rows_ND, *others), fixed, self._pool)
            if len(self._recordings) >= self._most:
                self._recordings.popitem(last=False)
            self._recordings[key] = recording
        self._recordings.move_to_end(key)
        return recording.replay((rows_ND, *others))


class _Recording:
    """One function at fixed shapes. All share one pool of memory: what a replay gives is copied before the next."""

    def __init__(
        self, function: Function, rows: int, inputs: tuple[Tensor, ...], fixed: tuple[Hashable, ...], pool: Any
    ) -> None:
        rows_ND, *others = inputs
        with torch.cuda.device(rows_ND.device):
            self._inputs = [rows_ND.new_zeros(rows, *rows_ND.shape[1:]), *map(torch.clone, others)]
            before, aside = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
            aside.wait_stream(before)
            with torch.cuda.stream(aside):
                function(*self._inputs, *fixed)  # kernels are compiled and loaded when they first run
            before.wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
                self._outputs = function(*self._inputs, *fixed)

    def replay(self, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        rows = len(inputs[0])
        for place, tensor in zip(self._inputs, inputs, strict=True):
            place[: len(tensor)].copy_(tensor)
        self._graph.replay()
        return tuple(output[:rows].clone() for output in self._outputs)
