"""Who holds what, as a mesh file says it: which service each stage is, and which services hold each expert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from expertmesh.checkpoint import manifest as names
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.errors import SetupError
from expertmesh.mesh_file import STAGES, MeshFile, Service, parse_experts
from expertmesh.rpc.replicas.resolver import parse_name

Pair = tuple[int, int]


@dataclass(frozen=True)
class Placed:
    """A service and what it must hold.

    Attributes:
        service: As the mesh file has it.
        parts: Names of the parts of the model.
        pairs: Of an expert service, the (layer, expert) it holds.
    """

    service: Service
    parts: tuple[str, ...]
    pairs: tuple[Pair, ...] = ()

    def is_same(self, other: Placed) -> bool:
        """Whether the two differ in their replicas at most."""
        return (self.service.kind, self.parts) == (other.service.kind, other.parts)


@dataclass(frozen=True)
class Placement:
    """The services of a mesh that the gateway calls.

    Attributes:
        stages: By kind, those of which there is one: the stages but experts, and `full_model` if there is one.
        experts: The services of experts, in the order of the file.
    """

    stages: dict[str, Placed]
    experts: tuple[Placed, ...]

    @classmethod
    def of(cls, mesh_file: MeshFile, manifest: Manifest) -> Self:
        """Reads a mesh file.

        Raises:
            SetupError: A stage, or an expert of the model, is in no service; a single stage is in two; or an address
                cannot be right.
        """
        kind2parts: dict[str, Iterable[str]] = {
            "tokenizer": manifest.tokenizer_parts(),
            "embedding": [names.embedding_part()],
            "gating": map(names.gating_part, range(manifest.spec.layers)),
            "classifier": [names.classifier_part()],
            "full_model": manifest.parts,
        }
        stages = {}
        for kind, parts in kind2parts.items():
            services = mesh_file.of_kind(kind)
            if len(services) != 1 and (kind in STAGES or services):
                raise SetupError(f"the mesh file must have one service of kind {kind}, not {len(services)}")
            if services:
                stages[kind] = Placed(services[0], tuple(parts))
        placement = cls(stages, tuple(_experts(service, manifest) for service in mesh_file.of_kind("expert")))
        placement._check(manifest)
        return placement

    @property
    def all(self) -> dict[str, Placed]:
        """Every service by its name."""
        return {placed.service.name: placed for placed in (*self.stages.values(), *self.experts)}

    def _check(self, manifest: Manifest) -> None:
        held = {pair for placed in self.experts for pair in placed.pairs}
        spec = manifest.spec
        for pair in ((layer, expert) for layer in spec.sparse_layers for expert in range(spec.router.experts)):
            if pair not in held:
                raise SetupError(f"no service of the mesh file holds expert {pair[1]} of layer {pair[0]}")
        for placed in self.all.values():
            for address in placed.service.replicas:
                parse_name(address)


def _experts(service: Service, manifest: Manifest) -> Placed:
    pairs = parse_experts(service.experts, manifest.spec.sparse_layers, manifest.spec.router.experts)
    return Placed(service, tuple(names.expert_part(*pair) for pair in pairs), tuple(pairs))
