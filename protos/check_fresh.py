"""Fails if the committed stubs are not what protos/ gives today."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

PROTOS = Path(__file__).resolve().parent
ROOT = PROTOS.parent


def main() -> int:
    """Generates into a scratch folder and compares."""
    with tempfile.TemporaryDirectory() as scratch:
        subprocess.run([PROTOS / "generate.sh", sys.executable, scratch], check=True)  # noqa: S603
        fresh = {path.relative_to(scratch): path.read_bytes() for path in Path(scratch).rglob("*_pb2*")}
    stale = [str(path) for path, data in sorted(fresh.items()) if (ROOT / path).read_bytes() != data]
    for path in stale:
        print(f"{path} is not what protos/ gives: run `make stubs`")
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
