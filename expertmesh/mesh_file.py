"""The mesh file: which services a mesh has, what they hold and where their replicas are.

One TOML file that `expertmesh up` writes, the gateway reads and watches, and containers are set up from::

    model = "models/agnews"

    [[service]]
    name = "expert-3"
    kind = "expert"
    experts = ["*:3"]
    replicas = ["unix:/run/expertmesh/expert-3.0.sock", "dns:///expert-3:50051"]

`experts` lists what an expert service holds as `LAYER:EXPERT`; `*` stands for every layer or every expert.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tomli_w

from expertmesh.errors import SetupError

STAGES = ("tokenizer", "embedding", "gating", "expert", "classifier")
KINDS = (*STAGES, "full_model", "gateway")


@dataclass(frozen=True)
class Service:
    """One service and its replicas.

    Attributes:
        name: Unique in the mesh; letters, digits, `-` and `_`.
        kind: One of `KINDS`.
        replicas: Addresses: `unix:PATH`, `HOST:PORT`, `[IPV6]:PORT`, or `dns:///NAME:PORT`, behind which there may be
            several.
        experts: For kind `expert`: what it holds, as `LAYER:EXPERT`.
        http: For kind `gateway`: the address of its HTTP side; of several gateways, in their order, with commas.
    """

    name: str
    kind: str
    replicas: tuple[str, ...]
    experts: tuple[str, ...] = ()
    http: str = ""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SetupError(f"mesh file: service {self.name!r} has the unknown kind {self.kind!r}")
        if not self.name.replace("-", "").replace("_", "").isalnum():
            raise SetupError(f"mesh file: {self.name!r} is no name of a service")
        for value in (self.replicas, self.experts):
            if not isinstance(value, tuple) or not all(isinstance(entry, str) for entry in value):
                raise SetupError(f"mesh file: service {self.name}: replicas and experts must be lists of strings")
        if not self.replicas:
            raise SetupError(f"mesh file: service {self.name} has no replicas")
        if (self.kind == "expert") != bool(self.experts):
            raise SetupError(f"mesh file: service {self.name}: `experts` belongs to every service of kind expert")


@dataclass(frozen=True)
class MeshFile:
    """A mesh: its model folder and its services."""

    model: str
    services: tuple[Service, ...]

    def __post_init__(self) -> None:
        names = [service.name for service in self.services]
        if len(set(names)) != len(names):
            raise SetupError("mesh file: two services have the same name")

    def of_kind(self, kind: str) -> list[Service]:
        """The services of one kind, in the order of the file."""
        return [service for service in self.services if service.kind == kind]

    def write(self, path: Path) -> None:
        """Writes the file; a reader sees the old or the new one, never a part."""
        tables = []
        for service in self.services:
            plain = {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(service).items()}
            tables.append({key: value for key, value in plain.items() if value})
        draft = path.with_suffix(".draft")
        draft.write_text(tomli_w.dumps({"model": self.model, "service": tables}))
        draft.replace(path)

    @classmethod
    def read(cls, path: Path) -> MeshFile:
        """Reads a mesh file.

        Raises:
            SetupError: It is missing, no TOML, or says something that is not understood.
        """
        try:
            values = tomllib.loads(path.read_text())
        except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise SetupError(f"mesh file {path} cannot be read: {error}") from None
        unknown = sorted(set(values) - {"model", "service"})
        if unknown:
            raise SetupError(f"mesh file {path}: unknown keys: {', '.join(unknown)}")
        try:
            services = tuple(_service(table) for table in values["service"])
            return cls(model=str(values["model"]), services=services)
        except KeyError as error:
            raise SetupError(f"mesh file {path}: {error} is missing") from None
        except (TypeError, AttributeError) as error:
            raise SetupError(f"mesh file {path}: {error}") from None


def _service(table: dict[str, Any]) -> Service:
    plain: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in table.items()}
    return Service(**plain)


def parse_experts(patterns: Sequence[str], layers: Sequence[int], experts: int) -> list[tuple[int, int]]:
    """The (layer, expert) pairs that patterns like `0:3`, `*:3` or `*:*` stand for, ascending.

    Args:
        patterns: Of an expert service.
        layers: The layers that have experts.
        experts: Experts of such a layer.

    Raises:
        SetupError: A pattern is malformed, or names a layer or an expert that the model does not have.
    """
    pairs: set[tuple[int, int]] = set()
    for pattern in patterns:
        layer, _, expert = pattern.partition(":")
        pairs.update((i, j) for i in _named(layer, layers, pattern) for j in _named(expert, range(experts), pattern))
    return sorted(pairs)


def _named(value: str, known: Sequence[int], pattern: str) -> Sequence[int]:
    if value == "*":
        return known
    if not value.isascii() or not value.isdecimal() or int(value) not in known:
        raise SetupError(f"experts: {pattern!r} is not LAYER:EXPERT of this model's {_told(known)}, or *")
    return [int(value)]


def _told(known: Sequence[int]) -> str:
    return f"{known[0]} to {known[-1]}" if known else "none"
