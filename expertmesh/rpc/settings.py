"""Settings of a program: one frozen dataclass, filled from flag > environment > file > default.

A field `log_level` is the flag `--log-level`, the variable `EXPERTMESH_LOG_LEVEL` and the key `log_level` of the
TOML file that `--config` names. A bad value stops the start with one clear line.
"""

from __future__ import annotations

import argparse
import os
import tomllib
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from expertmesh.errors import SetupError

SettingsT = TypeVar("SettingsT", bound="Settings")
LINK_SUFFIX = ".link"  # of the socket for links between neighbours, behind the path of the one for gRPC
_TRUTH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def setting(help_text: str, default: Any = MISSING) -> Any:
    """A field of a settings class, with the help that `--help` shows."""
    return field(default=default, metadata={"help": help_text})


@dataclass(frozen=True)
class Settings:
    """What every program can be told."""

    name: str = setting("how this replica calls itself in logs; its kind by default", "")
    listen: str = setting("gRPC address to listen on: HOST:PORT (port 0: a free one) or unix:PATH", "127.0.0.1:0")
    metrics: str = setting("HTTP address for Prometheus' /metrics: HOST:PORT; empty for none", "")
    log_level: str = setting("debug, info, warning or error", "info")
    grace_s: float = setting("seconds that running calls get to end when the program is stopped", 5.0)
    drain_s: float = setting("seconds between saying NOT_SERVING and refusing new calls", 0.0)
    max_message_bytes: int = setting("largest message accepted", 64 * 2**20)

    def __post_init__(self) -> None:
        check(self.log_level in ("debug", "info", "warning", "error"), f"log_level {self.log_level!r} is not known")
        check(0 <= self.grace_s <= 3600, "grace_s must be in [0, 3600]")
        check(0 <= self.drain_s <= 3600, "drain_s must be in [0, 3600]")
        check(2**10 <= self.max_message_bytes < 2**31, "max_message_bytes must be in [1024, 2^31)")
        parse_address(self.listen, "listen")
        if self.metrics:
            parse_host_port(self.metrics, "metrics")


@dataclass(frozen=True)
class ModelSettings(Settings):
    """What every program that computes can be told."""

    model: Path = setting("folder of the split model", Path("models/agnews"))
    device: str = setting("device to compute on: cpu, cuda or cuda:N", "cpu")
    threads: int = setting("threads to compute with on cpu", 1)
    simulate_step_ms: float = setting("for benchmarks: milliseconds that every piece of work takes at least", 0.0)
    simulate_row_us: float = setting("for benchmarks: microseconds more for every token row in it", 0.0)
    cuda_graphs: bool = setting("on cuda, record what is computed for few rows and replay it", True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1 <= self.threads <= 1024, "threads must be in [1, 1024]")
        check(0 <= self.simulate_step_ms <= 60_000, "simulate_step_ms must be in [0, 60000]")
        check(0 <= self.simulate_row_us <= 60_000_000, "simulate_row_us must be in [0, 60000000]")


@dataclass(frozen=True)
class CacheSettings(ModelSettings):
    """What every program with a KV cache can be told."""

    kv_tokens: int = setting("tokens that the KV cache holds; 0: as many as are sensible for the memory there is", 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.kv_tokens >= 0, "kv_tokens must not be negative")


def check(holds: bool, message: str) -> None:
    """Raises SetupError unless something holds."""
    if not holds:
        raise SetupError(message)


def parse_host_port(value: str, name: str) -> tuple[str, int]:
    """Splits `HOST:PORT` or `[IPV6]:PORT`.

    Raises:
        SetupError: It is neither.
    """
    host, _, port = value.rpartition(":")
    check(bool(host) and port.isdecimal() and int(port) < 65536, f"{name} {value!r} is not HOST:PORT")
    return host.strip("[]"), int(port)


def parse_address(value: str, name: str) -> None:
    """Checks a gRPC address to listen on.

    Raises:
        SetupError: It is neither `unix:PATH` nor `HOST:PORT`.
    """
    if value.startswith("unix:"):
        most = 107 - len(LINK_SUFFIX)  # of a socket's path, of which there is a second one
        path_bytes = len(value.removeprefix("unix:").encode())
        check(0 < path_bytes <= most, f"{name}: a unix socket's path has 1 to {most} bytes here")
    else:
        parse_host_port(value, name)


def read_settings(
    cls: type[SettingsT], program: str, arguments: Sequence[str], environment: Mapping[str, str] | None = None
) -> SettingsT:
    """Reads a program's settings.

    Raises:
        SetupError: A value is missing, unknown or bad.
        SystemExit: `--help` was asked for, or a flag is not known.
    """
    environment = os.environ if environment is None else environment
    hints = typing.get_type_hints(cls)
    parser = argparse.ArgumentParser(prog=f"python -m services.{program}", allow_abbrev=False)
    parser.add_argument(
        "--config", type=Path, help="TOML file with settings", default=environment.get("EXPERTMESH_CONFIG")
    )
    for entry in fields(cls):
        default = "" if entry.default in (MISSING, "") else f" (default: {entry.default})"
        is_switch = hints[entry.name] is bool
        parser.add_argument(
            _flag(entry),
            help=f"{entry.metadata['help']}{default}",
            nargs="?" if is_switch else None,
            const="true" if is_switch else None,
        )
    flags = vars(parser.parse_args(arguments))
    stored = _read_file(flags["config"], {entry.name for entry in fields(cls)})
    values: dict[str, Any] = {}
    for entry in fields(cls):
        variable = f"EXPERTMESH_{entry.name.upper()}"
        sources = (
            (_flag(entry), flags[entry.name]),
            (variable, environment.get(variable)),
            (entry.name, stored.get(entry.name)),
        )
        told, given = next(((told, given) for told, given in sources if given is not None), ("", None))
        if given is not None:
            values[entry.name] = _convert(given, hints[entry.name], told)
        elif entry.default is MISSING:
            raise SetupError(f"{_flag(entry)} is needed (or {variable})")
    return cls(**values)


def to_arguments(settings: Settings) -> list[str]:
    """The flags that give these settings again."""
    pairs = ((entry, getattr(settings, entry.name)) for entry in fields(settings))
    return [f"{_flag(entry)}={value}" for entry, value in pairs if value != entry.default]


def _flag(entry: Field[Any]) -> str:
    return "--" + entry.name.replace("_", "-")


def _read_file(path: Path | str | None, known: set[str]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = tomllib.loads(Path(path).read_text())
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SetupError(f"settings file {path} cannot be read: {error}") from None
    unknown = sorted(set(values) - known)
    check(not unknown, f"settings file {path}: unknown keys: {', '.join(unknown)}")
    return values


def _convert(value: Any, kind: type, name: str) -> Any:
    try:
        if kind is bool and not isinstance(value, bool):
            return _TRUTH[str(value).lower()]
        if kind is int and isinstance(value, float):
            raise ValueError(value)  # int() would cut it
        return kind(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        raise SetupError(f"{name} = {value!r} is no {kind.__name__}") from None
