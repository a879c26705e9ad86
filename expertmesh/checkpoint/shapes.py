"""What tensors each part of a model has, by its spec."""

from __future__ import annotations

import re

import torch
from torch import nn

from expertmesh.errors import BadCheckpoint
from expertmesh.model.attention import gating_stage
from expertmesh.model.embedding import EmbeddingStage
from expertmesh.model.head import head
from expertmesh.model.layers import GatedMLP
from expertmesh.model.spec import ModelSpec

_GATING = re.compile(r"gating/layer-(\d+)")


class PartShapes:
    """The shapes of every tensor of every part; asked for many parts, it makes each kind of stage once."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._known: dict[str, dict[str, tuple[int, ...]]] = {}

    def of(self, part: str) -> dict[str, tuple[int, ...]]:
        """Shape by name of the tensors of one part."""
        kind = self._kind(part)
        if kind not in self._known:
            try:
                with torch.device("meta"):
                    module = self._module(part)
            except RuntimeError as error:  # a product of sizes that no machine can count
                raise BadCheckpoint(f"part {part}: the sizes of the spec are too large: {error}") from None
            self._known[kind] = {name: tuple(value.shape) for name, value in module.state_dict().items()}
        return self._known[kind]

    def _kind(self, part: str) -> str:
        if match := _GATING.fullmatch(part):
            return "dense" if int(match[1]) in self._spec.dense.layers else "sparse"
        return part.partition("/")[0]

    def _module(self, part: str) -> nn.Module:
        if match := _GATING.fullmatch(part):
            return gating_stage(self._spec, int(match[1]))
        if part.startswith("experts/"):
            return GatedMLP(self._spec.width, self._spec.expert)
        return EmbeddingStage(self._spec) if part == "embedding" else head(self._spec)


def check_shapes(part: str, given: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]) -> None:
    """Compares the tensors of a part with what its stage has.

    Raises:
        BadCheckpoint: They differ, by name or shape.
    """
    if given != expected:
        wrong = min(key for key in expected.keys() | given.keys() if expected.get(key) != given.get(key))
        raise BadCheckpoint(
            f"part {part}: tensor {wrong!r} is {given.get(wrong, 'absent')},"
            f" the spec needs {expected.get(wrong, 'none')}"
        )
