"""Which processes a local mesh has: names, addresses, arguments, and the mesh file that says so."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.errors import SetupError
from expertmesh.mesh_file import KINDS, MeshFile, Service
from expertmesh.rpc.settings import parse_address, parse_host_port

MESH_FILE = "mesh.toml"
START_TIMEOUT_S = 120.0
EXPERT_SERVICES = 8  # so many are sensible on any machine
WITHOUT_TORCH = ("tokenizer", "gateway")


@dataclass(frozen=True)
class Options:
    """What a caller may say about a local mesh.

    Attributes:
        grpc: Address of the gateway's gRPC side; port 0 takes a free one.
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
    """

    name: str
    service: str
    kind: str
    address: str
    arguments: list[str]

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
    """A local mesh before it runs."""

    mesh_file: MeshFile
    processes: list[Process]
    grpc: str
    http: str


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
    grpc_address, http_address = free_address(options.grpc, "--grpc"), free_address(options.http, "--http")
    services = [_service(folder, name, kind, experts, options) for name, kind, experts in _layout(manifest, options)]
    services.append(Service("gateway", "gateway", (grpc_address,), http=http_address))
    _check_names(services, options)
    for service in services:
        for address in service.replicas:
            parse_address(address, f"--run-dir {folder} is too long for {service.name}")
    mesh_file = MeshFile(str(model), tuple(services))
    processes = [
        _process(service, replica, address, mesh_file, folder, options)
        for service in services
        for replica, address in enumerate(service.replicas)
    ]
    return Plan(mesh_file, processes, grpc_address, http_address)


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


def _service(folder: Path, name: str, kind: str, experts: tuple[str, ...], options: Options) -> Service:
    count = options.replicas.get(name, options.replicas.get(kind, 1))
    if not 1 <= count <= 64:
        raise SetupError(f"{name} can have 1 to 64 replicas, not {count}")
    return Service(name, kind, tuple(f"unix:{folder / name}.{replica}.sock" for replica in range(count)), experts)


def _process(
    service: Service, replica: int, address: str, mesh_file: MeshFile, folder: Path, options: Options
) -> Process:
    name = f"{service.name}.{replica}"
    arguments = [f"--name={name}", f"--listen={address}"]
    device = options.devices.get(service.name, options.devices.get(service.kind, "cpu"))
    if service.kind == "gateway":
        arguments += [f"--mesh={folder / MESH_FILE}", f"--http={service.http}", f"--settle-s={START_TIMEOUT_S}"]
        arguments += _one_at_a_time(options)
    else:
        arguments += [f"--model={mesh_file.model}", "--metrics=127.0.0.1:0", f"--device={device}"]
    if simulated := options.simulate.get(service.name, options.simulate.get(service.kind)):
        step_ms, _, row_us = simulated.partition("+")
        arguments += [f"--simulate-step-ms={step_ms}", f"--simulate-row-us={row_us or 0}"]
    if service.kind == "expert":
        arguments += [f"--experts={','.join(service.experts)}", f"--faults={options.faults}"]
    if service.kind == "full_model":
        arguments.append(f"--threads={os.cpu_count() or 1}")
    if service.kind in ("gateway", "full_model", "classifier"):
        arguments.append(f"--inspect={options.inspect}")
    return Process(name, service.name, service.kind, address, arguments)


def _one_at_a_time(options: Options) -> list[str]:
    """Where all processes share the same cores, one pass or step at a time is fastest: nothing has to be found out."""
    if options.simulate or any(device != "cpu" for device in options.devices.values()):
        return []
    flags = {"EXPERTMESH_PASSES": "--passes=1", "EXPERTMESH_MICRO_BATCHES": "--micro-batches=1"}
    return [flag for variable, flag in flags.items() if variable not in os.environ]


def _check_names(services: list[Service], options: Options) -> None:
    known = {service.name for service in services} | set(KINDS)
    for name in (*options.replicas, *options.devices, *options.simulate):
        if name not in known:
            raise SetupError(f"this mesh has no service {name!r}; it has: {', '.join(s.name for s in services)}")
    for name in options.devices:
        if name in WITHOUT_TORCH:
            raise SetupError(f"{name} computes nothing on a device")
    if any(name == "gateway" for name in options.replicas):
        raise SetupError("a local mesh has one gateway")


def free_address(address: str, option: str) -> str:
    """Gives an address with a port that is free, the one that is asked for or any for port 0.

    Raises:
        SetupError: It is in use.
    """
    host, port = parse_host_port(address, option)
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise SetupError(
                f"{option} {address}: {error.strerror}; choose another, or port 0 for any free one"
            ) from None
        return f"{address.rpartition(':')[0]}:{probe.getsockname()[1]}"
