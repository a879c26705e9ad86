"""The options that say how a local mesh is laid out, shared by every verb that starts one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from expertmesh.errors import SetupError
from expertmesh.local.plan import Options
from expertmesh.local.state import default_folder

DEFAULT_MODEL = Path("models/agnews")

Model = Annotated[Path, typer.Argument(help="Folder of the split model.")]
RunDir = Annotated[
    Path, typer.Option("--run-dir", help="Folder for sockets, logs and state.", default_factory=default_folder)
]
Address = Annotated[
    str,
    typer.Option("--address", help="gRPC address of a gateway, or several with commas; by default what `up` runs."),
]
ExpertServices = Annotated[
    int,
    typer.Option(
        "--expert-services",
        help="Spread the experts over so many services; 0: each its own, but no more than sensible here.",
        min=0,
    ),
]
Replicas = Annotated[
    list[str] | None, typer.Option("--replicas", help="SERVICE=N or KIND=N, as in expert-3=2 or expert=2; repeatable.")
]
Devices = Annotated[
    list[str] | None, typer.Option("--device", help="SERVICE=DEVICE or KIND=DEVICE, as in expert=cuda:0; repeatable.")
]


def read_options(
    expert_services: int = 0,
    replicas: list[str] | None = None,
    devices: list[str] | None = None,
    grpc: str = "127.0.0.1:0",
    http: str = "127.0.0.1:0",
    inspect: bool = False,
    faults: bool = False,
    full_model: bool = True,
) -> Options:
    """Options of a local mesh from those of the command line.

    Raises:
        SetupError: One is malformed.
    """
    counts = read_counts(replicas, "--replicas")
    return Options(grpc, http, expert_services, counts, _pairs(devices, "--device"), inspect, faults, full_model)


def read_counts(values: list[str] | None, option: str) -> dict[str, int]:
    """Numbers of replicas by service or kind, as `NAME=N` says them.

    Raises:
        SetupError: One is malformed.
    """
    counts = {}
    for name, value in _pairs(values, option).items():
        if not (value.isascii() and value.isdecimal()):
            raise SetupError(f"{option} {name}={value}: {value!r} is no number")
        counts[name] = int(value)
    return counts


def _pairs(values: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for value in values or []:
        name, equals, given = value.partition("=")
        if not (name and equals and given):
            raise SetupError(f"{option} {value!r} is not NAME=VALUE")
        pairs[name] = given
    return pairs
