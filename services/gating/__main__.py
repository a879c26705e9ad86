"""Starts gating: `python -m services.gating --model DIR --listen ADDRESS`."""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.rpc.server import Program, Servicer, main_guard, run
from expertmesh.rpc.settings import CacheSettings, check, read_settings, setting
from expertmesh.serving.caching import make_leases, reaping
from expertmesh.serving.stage import Stage
from expertmesh.telemetry.tracing import Tracing
from expertmesh.v1.gating_pb2_grpc import add_GatingServiceServicer_to_server

from .service import GatingServicer


@dataclass(frozen=True)
class GatingSettings(CacheSettings):
    """What gating can be told."""

    lease_s: float = setting("seconds after which a sequence that no gateway speaks of is forgotten", 8.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0 < self.lease_s <= 3600, "lease_s must be in (0, 3600]")


def load(settings: GatingSettings, tracing: Tracing) -> Program:
    """Loads the gating of every layer and warms it up."""
    stage = Stage("gating", settings)
    leases = make_leases(stage, settings.kv_tokens, settings.lease_s) if stage.spec.generates else None
    servicer = GatingServicer(stage, leases)
    registration = Servicer("expertmesh.v1.GatingService", add_GatingServiceServicer_to_server, servicer)
    return Program(
        [registration],
        stage.description(),
        reaping(leases),
        is_idle=lambda: leases is None or leases.is_empty,
    )


def main(arguments: list[str]) -> int:
    """Runs the program until it is stopped; gives its exit status."""
    return run(read_settings(GatingSettings, "gating", arguments), "gating", load)


if __name__ == "__main__":
    main_guard(main)
