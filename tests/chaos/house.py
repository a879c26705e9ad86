"""`expertmesh up` with what its options do not offer: devices that are simulated, and proxies before replicas.

`python -m tests.chaos.house TOML up MODEL ...`, where the file holds tables `simulate` (service or kind to
`STEP_MS+ROW_US`) and `proxies` (address of a replica to the one that the mesh file names in its place).
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertmesh.cli import main, up
from expertmesh.local.plan import Options, Plan, plan_mesh
from expertmesh.mesh_file import MeshFile


def run(extras: Mapping[str, Any], arguments: list[str]) -> None:
    """Runs the command with devices that are simulated, and mesh files that name proxies where there are some."""
    proxies: Mapping[str, str] = extras.get("proxies", {})
    write = MeshFile.write

    def simulated(model: Path, manifest: Any, folder: Path, options: Options, *more: Any, **named: Any) -> Plan:
        return plan_mesh(model, manifest, folder, replace(options, simulate=extras.get("simulate", {})), *more, **named)

    def write_proxied(mesh_file: MeshFile, path: Path) -> None:
        services = tuple(
            replace(service, replicas=tuple(proxies.get(address, address) for address in service.replicas))
            for service in mesh_file.services
        )
        write(replace(mesh_file, services=services), path)

    up.plan_mesh = simulated  # type: ignore[attr-defined]
    MeshFile.write = write_proxied  # type: ignore[method-assign, assignment]
    sys.argv = ["expertmesh", *arguments]
    main.main()


if __name__ == "__main__":
    run(tomllib.loads(Path(sys.argv[1]).read_text()), sys.argv[2:])
