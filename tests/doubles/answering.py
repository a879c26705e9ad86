"""A child of a benchmark that doubles numbers, prints beside its answers, and ends on what is no number."""

from __future__ import annotations

from benchmarks.child import serve


def double(number: int) -> int:
    print("printed by the way")
    return 2 * int(number)


if __name__ == "__main__":
    serve(double)
