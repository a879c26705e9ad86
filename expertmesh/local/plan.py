"""Which processes a local mesh has: names, addresses, arguments, and the mesh file that says so."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.errors import SetupError
from expertmesh.local.ports import Ports
from expertmesh.mesh_file import KINDS, MeshFile, Service
from expertmesh.rpc.settings import parse_address

MESH_FILE = "mesh.toml"
START_TIMEOUT_S = 120.0
EXPERT_SERVICES = 8  # so many are sensible on any machine
MOST_REPLICAS = 64
GATEWAY_DRAIN_S = 0.3  # in which clients see that a gateway is stopping, and go to another
WITHOUT_TORCH = ("tokenizer", "gateway")


@dataclass(frozen=True)
class Options:
    """What a caller may say about a local mesh.

    Attributes:
        grpc: Address of the first gateway's gRPC side; port 0 takes a free one. Others take the next free ports.
        http: Address of its HTTP side, likewise.
        expert_services: Over how many services the experts are spread; 0 gives each expert its own, where the machine
            has so many cores, or there are no more than `EXPERT_SERVICES`.
        replicas: Replicas by service name or kind; 1 where nothing is said.
        devices: Device by service name or kind; `cpu` where nothing is said.
        inspect: Whether gateway and full model offer InspectionService.
        faults: Whether experts offer faults on demand.
        full_model: Whether there is a full model to fall back on.
        simulate: By service name or kind, how long its device takes, for benchmarks: `STEP_MS` or `STEP_MS+ROW_US`.
    """

    grpc: str = "127.0.0.1:0"
    http: str = "127.0.0.1:0"
    expert_services: int = 0
    replicas: Mapping[str, int] = field(default_factory=dict)
    devices: Mapping[str, str] = field(default_factory=dict)
    inspect: bool = False
    faults: bool = False
    full_model: bool = True
    simulate: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Process:
    """One process to start.

    Attributes:
        name: `SERVICE.REPLICA`.
        service: The service it is a replica of.
        kind: What kind that is; `services.KIND` is its program.
        address: Where it will listen.
        arguments: Of its program.
        http: Of a gateway: the address of its HTTP side.
    """

    name: str
    service: str
    kind: str
    address: str
    arguments: list[str]
    http: str = ""

    @property
    def module(self) -> str:
        """The program's module."""
        return f"services.{self.kind}"

    @property
    def fresh(self) -> bool:
        """Whether it is executed afresh, so that it does not hold torch."""
        return self.kind in WITHOUT_TORCH


@dataclass(frozen=True)
class Plan:
    """A local mesh before it runs, and how further replicas of its services are laid out.

    Attributes:
        model: Folder of the split model.
        folder: Where sockets, logs and the mesh file go.
        options: What the caller said.
        services: In the order of a request, each as the mesh file has it at first.
        processes: One for each replica, in the same order.
    """

    model: Path
    folder: Path
    options: Options
    services: tuple[Service, ...]
    processes: list[Process]

    @property
    def mesh_file(self) -> MeshFile:
        """What the gateway reads at first."""
        return MeshFile(str(self.model), self.services)

    @property
    def grpc(self) -> str:
        """Address of the gateway's gRPC side; of several, with commas, as clients take them."""
        return ",".join(process.address for process in self.processes if process.kind == "gateway")

    @property
    def http(self) -> str:
        """Address of the gateway's HTTP side, likewise."""
        return ",".join(process.http for process in self.processes if process.kind == "gateway")

    def further(self, service: Service, number: int) -> Process:
        """A further replica of a service, at an address of its own.

        Args:
            service: As the mesh file has it now.
            number: Of the replica; none has had it before.

        Raises:
            SetupError: There is no such address.
        """
        if service.kind != "gateway":
            address = _socket(self.folder, service.name, number)
            return _process(service, number, address, "", self.model, self.folder, self.options)
        ports = Ports((*service.replicas, *service.http.split(",")))
        grpc, http = ports.further(self.options.grpc, "--grpc"), ports.further(self.options.http, "--http")
        return _process(service, number, grpc, http, self.model, self.folder, self.options)


def plan_mesh(model: Path, manifest: Manifest, folder: Path, options: Options) -> Plan:
    """Lays out a mesh.

    Args:
        model: Folder of the split model.
        manifest: Its manifest.
        folder: Where sockets, logs and the mesh file go.
        options: What the caller said.

    Raises:
        SetupError: An option is bad, names a service that there is not, or a port is in use.
    """
    model = model.resolve()
    layout = [*_layout(manifest, options), ("gateway", "gateway", ())]
    _check_names([name for name, _, _ in layout], options)
    services: list[Service] = []
    processes: list[Process] = []
    for name, kind, experts in layout:
        count = options.replicas.get(name, options.replicas.get(kind, 1))
        check_count(name, count)
        if kind == "gateway":
            addresses, https = _gateways(count, options)
        else:
            addresses, https = [_socket(folder, name, number) for number in range(count)], [""] * count
        service = Service(name, kind, tuple(addresses), experts, http=",".join(https).strip(","))
        services.append(service)
        for number, (address, http) in enumerate(zip(addresses, https, strict=True)):
            processes.append(_process(service, number, address, http, model, folder, options))
    return Plan(model, folder, options, tuple(services), processes)


def check_count(name: str, count: int) -> None:
    """Raises SetupError unless a service can have so many replicas."""
    if not 1 <= count <= MOST_REPLICAS:
        raise SetupError(f"{name} can have 1 to {MOST_REPLICAS} replicas, not {count}")


def _gateways(count: int, options: Options) -> tuple[list[str], list[str]]:
    """Addresses of the gRPC sides and of the HTTP sides of some gateways."""
    ports = Ports()
    first = ports.first(options.grpc, "--grpc"), ports.first(options.http, "--http")
    others = [(ports.further(options.grpc, "--grpc"), ports.further(options.http, "--http")) for _ in range(1, count)]
    grpcs, https = zip(first, *others, strict=True)
    return list(grpcs), list(https)


def _socket(folder: Path, service: str, number: int) -> str:
    address = f"unix:{folder / service}.{number}.sock"
    parse_address(address, f"--run-dir {folder} is too long for {service}")
    return address


def _layout(manifest: Manifest, options: Options) -> list[tuple[str, str, tuple[str, ...]]]:
    """(name, kind, experts) of every service but the gateway, in the order of a request."""
    experts = manifest.spec.router.experts
    groups = options.expert_services or min(experts, max(EXPERT_SERVICES, os.cpu_count() or 1))
    if not 1 <= groups <= experts:
        raise SetupError(f"{experts} experts cannot be spread over {groups} services")
    layout: list[tuple[str, str, tuple[str, ...]]] = [(kind, kind, ()) for kind in ("tokenizer", "embedding", "gating")]
    for group in range(groups):
        held = range(group * experts // groups, (group + 1) * experts // groups)
        name = f"expert-{held[0]}" if len(held) == 1 else f"experts-{held[0]}-{held[-1]}"
        layout.append((name, "expert", tuple(f"*:{expert}" for expert in held)))
    layout.append(("classifier", "classifier", ()))
    if options.full_model:
        layout.append(("full_model", "full_model", ()))
    return layout


def _process(
    service: Service, number: int, address: str, http: str, model: Path, folder: Path, options: Options
) -> Process:
    name = f"{service.name}.{number}"
    arguments = [f"--name={name}", f"--listen={address}"]
    device = options.devices.get(service.name, options.devices.get(service.kind, "cpu"))
    if service.kind == "gateway":
        arguments += [f"--mesh={folder / MESH_FILE}", f"--http={http}", f"--settle-s={START_TIMEOUT_S}"]
        if "EXPERTMESH_DRAIN_S" not in os.environ:
            arguments.append(f"--drain-s={GATEWAY_DRAIN_S}")
        arguments += _one_at_a_time(options)
    else:
        arguments += [f"--model={model}", "--metrics=127.0.0.1:0", f"--device={device}"]
    if simulated := options.simulate.get(service.name, options.simulate.get(service.kind)):
        step_ms, _, row_us = simulated.partition("+")
        arguments += [f"--simulate-step-ms={step_ms}", f"--simulate-row-us={row_us or 0}"]
    if service.kind == "expert":
        arguments += [f"--experts={','.join(service.experts)}", f"--faults={options.faults}"]
    if service.kind == "full_model":
        arguments.append(f"--threads={os.cpu_count() or 1}")
    if service.kind in ("gateway", "full_model", "classifier"):
        arguments.append(f"--inspect={options.inspect}")
    return Process(name, service.name, service.kind, address, arguments, http)


def _one_at_a_time(options: Options) -> list[str]:
    """Where all processes share the same cores, one pass or step at a time is fastest: nothing has to be found out."""
    if options.simulate or any(device != "cpu" for device in options.devices.values()):
        return []
    flags = {"EXPERTMESH_PASSES": "--passes=1", "EXPERTMESH_MICRO_BATCHES": "--micro-batches=1"}
    return [flag for variable, flag in flags.items() if variable not in os.environ]


def _check_names(services: list[str], options: Options) -> None:
    known = {*services, *KINDS}
    for name in (*options.replicas, *options.devices, *options.simulate):
        if name not in known:
            raise SetupError(f"this mesh has no service {name!r}; it has: {', '.join(services)}")
    for name in options.devices:
        if name in WITHOUT_TORCH:
            raise SetupError(f"{name} computes nothing on a device")
