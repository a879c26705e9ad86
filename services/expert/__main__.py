"""Starts experts: `python -m services.expert --model DIR --experts '*:3' --listen ADDRESS`."""

from __future__ import annotations

from dataclasses import dataclass

from expertmesh.mesh_file import parse_experts
from expertmesh.rpc.server import Program, Servicer, main_guard, run
from expertmesh.rpc.settings import ModelSettings, check, read_settings, setting
from expertmesh.serving.stage import Stage
from expertmesh.telemetry.tracing import Tracing
from expertmesh.v1.expert_pb2_grpc import add_ExpertServiceServicer_to_server
from expertmesh.v1.fault_pb2_grpc import add_FaultServiceServicer_to_server

from .faults import SERVICE, FaultServicer, MisbehavingExpert
from .service import ExpertServicer


@dataclass(frozen=True)
class ExpertSettings(ModelSettings):
    """What an expert service can be told."""

    experts: str = setting("what it holds: LAYER:EXPERT, with * for every one, comma-separated", "*:*")
    together_rows: int = setting("most rows that become one product when several calls wait for the same expert", 1024)
    faults: bool = setting("offer faults on demand, for tests only", False)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.together_rows >= 1, "together_rows must be at least 1")


def load(settings: ExpertSettings, tracing: Tracing) -> Program:
    """Loads the experts and warms them up."""
    stage = Stage("expert", settings, settings.together_rows)
    spec = stage.spec
    pairs = parse_experts(settings.experts.split(","), spec.sparse_layers, spec.router.experts)
    servicer = ExpertServicer(stage, pairs)
    if not settings.faults:
        registrations = [Servicer(SERVICE, add_ExpertServiceServicer_to_server, servicer)]
    else:
        calls = MisbehavingExpert(servicer)
        faults = FaultServicer(servicer.bank, calls)
        registrations = [
            Servicer(SERVICE, MisbehavingExpert.add_to_server, calls),
            Servicer("expertmesh.v1.FaultService", add_FaultServiceServicer_to_server, faults),
        ]
    return Program(registrations, stage.description())


def main(arguments: list[str]) -> int:
    """Runs the program until it is stopped; gives its exit status."""
    return run(read_settings(ExpertSettings, "expert", arguments), "expert", load)


if __name__ == "__main__":
    main_guard(main)
