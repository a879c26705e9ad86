"""Starts a service by name: `python -P -m services expert --experts '*:3'`. It is what the container image runs."""

from __future__ import annotations

import importlib
import signal
import sys

from expertmesh.errors import SetupError
from expertmesh.mesh_file import KINDS
from expertmesh.rpc.server import main_guard


def main(arguments: list[str]) -> int:
    """Runs `services.NAME` with the other arguments, in this process; `full-model` is `full_model` as well.

    Raises:
        SetupError: There is no service of that name.
    """
    name = arguments[0].replace("-", "_") if arguments else ""
    if name not in KINDS:
        asked = f"there is no service {arguments[0]!r}" if arguments else "which service?"
        raise SetupError(f"{asked}; the first argument is one of: {', '.join(KINDS)}")
    # The first process of a container ignores signals that it does not handle, also while it loads its libraries.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    status: int = importlib.import_module(f"services.{name}.__main__").main(arguments[1:])
    return status


if __name__ == "__main__":
    main_guard(main)
