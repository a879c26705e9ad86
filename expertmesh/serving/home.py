"""Where sequences have their KV caches, as the scheduler sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from expertmesh.serving.generation import Generation
from expertmesh.serving.passes import Provenance
from expertmesh.serving.steps import Work
from expertmesh.v1.sampling_pb2 import TokenLogprobs


class HomeLost(Exception):
    """A home lost its caches, or cannot be reached: its sequences have to be computed anew, elsewhere or there."""


class Home(Protocol):
    """Where sequences have their KV caches: a gating replica, or the process of the full model."""

    @property
    def is_live(self) -> bool:
        """Whether it takes sequences."""

    @property
    def is_leaving(self) -> bool:
        """Whether its sequences are better off at another home, which there is; they may go on here meanwhile."""

    async def open(self, generation: Generation) -> None:
        """Reserves room; for what is open already it says that it is still wanted.

        Raises:
            Overloaded: There is none just now.
            InvalidInput: There never will be.
            HomeLost: It cannot be had here.
        """

    async def release(self, generations: Sequence[Generation]) -> None:
        """Frees sequences; never raises."""

    async def step(self, work: Sequence[Work]) -> tuple[list[TokenLogprobs], Sequence[Provenance]]:
        """Computes rows and draws tokens, one for each work that draws, in their order; says how, for each work.

        Raises:
            HomeLost: What was cached here is lost.
            NotFinite: NaN or infinity comes of it.
            MeshError: The step failed for another reason, of which the caches know nothing.
        """
