from __future__ import annotations

import socket
from pathlib import Path

import pytest

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.errors import SetupError
from expertmesh.local.plan import Options, Plan, plan_mesh
from expertmesh.local.ports import Ports

FLAGS = {"--passes=1", "--micro-batches=1"}


def planned(model: Path, tmp_path: Path, **options: object) -> Plan:
    return plan_mesh(model, Manifest.read(model), tmp_path, Options(**options))  # type: ignore[arg-type]


def arguments(plan: Plan, name: str) -> set[str]:
    return set(next(process.arguments for process in plan.processes if process.name == name))


def test_where_all_share_the_cores_one_pass_is_under_way(model: Path, tmp_path: Path) -> None:
    assert arguments(planned(model, tmp_path), "gateway.0") >= FLAGS


@pytest.mark.parametrize("options", [{"devices": {"gating": "cuda:0"}}, {"simulate": {"expert": "5"}}])
def test_where_devices_are_their_own_the_gateway_finds_out(
    model: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    assert not arguments(planned(model, tmp_path, **options), "gateway.0") & FLAGS


def test_what_the_environment_says_of_it_holds(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTMESH_PASSES", "2")
    assert arguments(planned(model, tmp_path), "gateway.0") & FLAGS == {"--micro-batches=1"}


def test_simulated_time_is_told_to_the_services_it_is_for(model: Path, tmp_path: Path) -> None:
    plan = planned(model, tmp_path, simulate={"expert": "25+100", "expert-3": "7", "gating": "5"})
    assert arguments(plan, "expert-0.0") >= {"--simulate-step-ms=25", "--simulate-row-us=100"}
    assert arguments(plan, "expert-3.0") >= {"--simulate-step-ms=7", "--simulate-row-us=0"}
    assert arguments(plan, "gating.0") >= {"--simulate-step-ms=5"}
    assert not any(argument.startswith("--simulate") for argument in arguments(plan, "classifier.0"))


def test_a_service_that_is_not_there_cannot_be_simulated(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="no service 'oracle'"):
        planned(model, tmp_path, simulate={"oracle": "5"})


def test_gateways_have_addresses_of_their_own(model: Path, tmp_path: Path) -> None:
    plan = planned(model, tmp_path, replicas={"gateway": 3})
    gateways = [process for process in plan.processes if process.kind == "gateway"]
    addresses = [address for process in gateways for address in (process.address, process.http)]
    assert len(set(addresses)) == 6
    (service,) = plan.mesh_file.of_kind("gateway")
    assert ",".join(service.replicas) == plan.grpc == ",".join(process.address for process in gateways)
    assert service.http == plan.http == ",".join(process.http for process in gateways)
    for process in gateways:
        assert {f"--listen={process.address}", f"--http={process.http}"} <= set(process.arguments)
    further = plan.further(service, 3)
    assert further.name == "gateway.3"
    assert not {further.address, further.http} & set(addresses)


def test_further_gateways_take_the_next_free_ports(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        ports = Ports()
        with pytest.raises(SetupError, match=r"--grpc 127\.0\.0\.1:\d+: Address already in use"):
            ports.first(f"127.0.0.1:{port}", "--grpc")
        found = [int(ports.further(f"127.0.0.1:{port - 1}", "--grpc").rpartition(":")[2]) for _ in range(3)]
    assert found == sorted(set(found))
    assert port not in found
    assert min(found) > port
    with pytest.raises(SetupError, match="no port above it is free"):
        ports.further("127.0.0.1:65535", "--grpc")


def test_a_further_replica_has_a_socket_of_its_own(model: Path, tmp_path: Path) -> None:
    plan = planned(model, tmp_path, replicas={"expert-3": 2})
    service = next(service for service in plan.mesh_file.services if service.name == "expert-3")
    further = plan.further(service, 2)
    assert (further.name, further.address) == ("expert-3.2", f"unix:{tmp_path}/expert-3.2.sock")
    like = next(process for process in plan.processes if process.name == "expert-3.1")
    assert further.arguments[2:] == like.arguments[2:]
    with pytest.raises(SetupError, match="too long"):
        plan.further(service, 10**100)
