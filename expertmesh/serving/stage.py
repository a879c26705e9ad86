"""What every program that computes has: a device, parts of a model, a numeric profile, and turns at the device."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy.typing as npt
import torch
from torch import Tensor

from expertmesh import __version__
from expertmesh.checkpoint.load import StageLoader
from expertmesh.errors import SetupError
from expertmesh.model.arrays import to_torch
from expertmesh.model.cuda import has_kernels
from expertmesh.model.fingerprint import Profile, take_profile
from expertmesh.model.graphs import Graphs
from expertmesh.model.sequences import Sequences
from expertmesh.model.spec import ModelSpec
from expertmesh.rpc.link.context import is_alone
from expertmesh.rpc.settings import ModelSettings
from expertmesh.serving.turns import SimulatedTime, Turns
from expertmesh.v1.description_pb2 import DescribeResponse, Part

SMALL_ROWS = 64  # token rows of a batch whose layout is kept for the next one like it, such as one text
SMALL_LAYOUTS = 48
LARGE_LAYOUTS = 2  # kept for the next layer; more would lie between freed blocks of the heap and keep it from shrinking

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Stage:
    """The device side of a service. Loading happens in its constructor and through `loader`.

    Args:
        kind: What kind of service this is.
        settings: Model folder, device and threads.
        together_rows: Most token rows of several calls that run together.

    Attributes:
        turns: The device's queue.

    Raises:
        SetupError: The device is not there, or the model folder is missing or damaged.
    """

    def __init__(self, kind: str, settings: ModelSettings, together_rows: int = 1024) -> None:
        self.kind = kind
        self.device = open_device(settings.device, settings.threads)
        has_graphs = settings.cuda_graphs and self.device.type == "cuda" and has_kernels()
        self.loader = StageLoader(Path(settings.model), self.device, Graphs() if has_graphs else None)
        self.profile: Profile = take_profile(self.spec, self.device)
        simulated = SimulatedTime(settings.simulate_step_ms / 1e3, settings.simulate_row_us / 1e6)
        self.turns = Turns(kind, simulated, together_rows)
        self._small_layout = lru_cache(SMALL_LAYOUTS)(self._new_layout)
        self._large_layout = lru_cache(LARGE_LAYOUTS)(self._new_layout)

    @property
    def spec(self) -> ModelSpec:
        """The model's spec."""
        return self.loader.spec

    def description(self) -> DescribeResponse:
        """What Describe answers, once everything is loaded."""
        manifest = self.loader.manifest
        return DescribeResponse(
            kind=self.kind,
            parts=[Part(name=name, digest=manifest.parts[name].digest) for name in self.loader.loaded],
            model_digest=manifest.digest,
            fingerprint=self.profile.fingerprint,
            profile=self.profile.name,
            device=str(self.device),
            version=__version__,
        )

    def compute(self, rows: int, work: Callable[[], ResultT], context: object) -> asyncio.Future[ResultT]:
        """Runs a call's work when it is its turn; see `Turns.run`."""
        return self.turns.run(rows, work, is_alone(context))

    def compute_together(
        self,
        key: Hashable,
        rows: int,
        item: ItemT,
        work: Callable[[Sequence[ItemT]], Sequence[ResultT]],
        context: object,
    ) -> asyncio.Future[ResultT]:
        """Runs it with that of other calls of one key; see `Turns.run_together`."""
        return self.turns.run_together(key, rows, item, work, is_alone(context))

    def warm_up(self, work: Callable[[], object]) -> None:
        """Runs work once before the first call, so that no caller waits for what only the first run does."""
        with torch.inference_mode():
            work()

    def tensor(self, array: npt.NDArray[Any]) -> Tensor:
        """An array on the device."""
        return to_torch(array, self.device)

    def sequences(self, lengths_B: npt.NDArray[Any]) -> Sequences:
        """The layout of a batch on the device; those of the latest batches, as the next layer's is one, are kept."""
        lengths = tuple(lengths_B.tolist())
        return self._small_layout(lengths) if sum(lengths) <= SMALL_ROWS else self._large_layout(lengths)

    def _new_layout(self, lengths: tuple[int, ...]) -> Sequences:
        return Sequences(torch.tensor(lengths, device=self.device))


def open_device(name: str, threads: int) -> torch.device:
    """Gives a device and bounds the threads that compute on cpu.

    Raises:
        SetupError: There is no such device.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError):
        raise SetupError(f"device {name!r} is not there") from None
    torch.set_num_threads(threads)
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = False
    return device
