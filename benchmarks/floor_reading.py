"""How fast one core reads memory, and packed weights while it multiplies; a child of `floor`."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from benchmarks.child import serve
from expertmesh.model import invariant

MATRICES, INPUTS, OUTPUTS = 32, 512, 2048
BYTES = MATRICES * INPUTS * OUTPUTS * 4


def main() -> None:
    """Answers {"rows", "seconds"} with GB/s: of products of so many rows, or of a plain sum for none."""
    torch.set_num_threads(1)
    numbers = torch.ones(MATRICES * INPUTS * OUTPUTS)
    packed = [invariant.pack(torch.randn(OUTPUTS, INPUTS)) for _ in range(MATRICES)]

    def answer(rows: int, seconds: float) -> float:
        rows_RD = torch.randn(rows, INPUTS)

        def multiply() -> None:
            for weight in packed:
                invariant.linear(rows_RD, weight)

        with torch.inference_mode():
            return _gb_s(multiply if rows else numbers.sum, seconds)

    serve(answer)


def _gb_s(read: Callable[[], object], seconds: float) -> float:
    read()
    started_s = time.perf_counter()
    times = 0
    while (took_s := time.perf_counter() - started_s) < seconds:
        read()
        times += 1
    return times * BYTES / took_s / 1e9


if __name__ == "__main__":
    main()
