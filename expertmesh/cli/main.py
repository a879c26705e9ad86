"""`expertmesh`: the command. Verbs are imported when they are used, so that none waits for another's libraries."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

import typer
from typer.core import TyperGroup

from expertmesh import __version__
from expertmesh.errors import MeshError

VERBS = {
    "up": "Start every service of a model as a local process, until Ctrl-C.",
    "down": "Stop the mesh that `up` started.",
    "scale": "Give services of the running mesh more or fewer replicas.",
    "restart": "Restart services of the running mesh, while it serves.",
    "status": "Show the services of the running mesh, their health and load.",
    "classify": "Classify texts.",
    "generate": "Continue a prompt.",
    "verify": "Compare mesh and full model bit by bit.",
    "eval": "Measure accuracy on labelled data.",
    "demo": "Start a mesh, classify a file through both routes, compare, stop.",
    "train": "Train a model.",
    "split": "Write a checkpoint as the parts that services load.",
}
EXIT_ERROR = 2


class _Verbs(TyperGroup):
    """Finds a verb's module by its name."""

    def list_commands(self, ctx: Any) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        if cmd_name not in VERBS:
            return None
        verb = getattr(importlib.import_module(f"expertmesh.cli.{cmd_name}"), cmd_name)
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command(name=cmd_name, short_help=VERBS[cmd_name])(verb)
        return typer.main.get_command(app)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl(list(VERBS.items()))


def main() -> None:
    """Runs the command; an error of ours is one line on stderr and status 2."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # threads that wait sleep: other programs share these cores
    if sys.argv[1:] == ["--version"]:
        print(f"expertmesh {__version__}")
        return
    group = _Verbs(name="expertmesh", help="Serve Mixture-of-Experts transformers as a mesh of services.")
    try:
        group.main(prog_name="expertmesh")
    except MeshError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_ERROR)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
