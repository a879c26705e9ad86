"""Which service to ask for which expert."""

from __future__ import annotations

from collections.abc import Iterable

from expertmesh.checkpoint.manifest import Manifest, expert_part
from expertmesh.errors import CorruptReply, Unavailable
from expertmesh.rpc.replicas.replica_set import ReplicaSet

from .placement import Pair


class Holders:
    """The services that hold the experts of a model.

    Args:
        held: Expert services, and the (layer, expert) that each holds.
        manifest: Of the model.
    """

    def __init__(self, held: Iterable[tuple[ReplicaSet, Iterable[Pair]]], manifest: Manifest) -> None:
        self._pair2services: dict[Pair, list[ReplicaSet]] = {}
        for service, pairs in held:
            for pair in pairs:
                self._pair2services.setdefault(pair, []).append(service)
        self._pair2digest = {pair: manifest.parts[expert_part(*pair)].digest for pair in self._pair2services}
        self._are_whole = False

    def of(self, layer: int, expert: int) -> ReplicaSet:
        """The service to ask for an expert: of those that hold it, one that has live replicas.

        Raises:
            Unavailable: None has; names the layer and the expert.
        """
        services = self._pair2services[layer, expert]
        for service in services:
            if service.has_live:
                return service
        for service in services:  # one that drains is better than none
            if service.live:
                return service
        raise expert_unavailable(services[0].unavailable(), layer, expert)

    def digest(self, layer: int, expert: int) -> bytes:
        """The digest that an expert's reply must carry."""
        return self._pair2digest[layer, expert]

    def require_all(self) -> None:
        """Checks that every expert has a live replica; what was found holds until `look_again`.

        Raises:
            Unavailable: Names the first that has none.
        """
        if self._are_whole:
            return
        for layer, expert in self._pair2services:
            self.of(layer, expert)
        self._are_whole = True

    def look_again(self) -> None:
        """Something happened to a replica."""
        self._are_whole = False


def expert_unavailable(error: Unavailable | CorruptReply, layer: int, expert: int) -> Unavailable:
    """An expert service's unavailability, or its wrong reply, named by layer and expert."""
    return Unavailable(f"expert {expert} of layer {layer}: {error}", error.stage, layer, expert)
