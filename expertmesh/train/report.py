"""What a person sees while training: a progress bar, and one table line per epoch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

BEFORE = {"epoch": 7}
BEHIND = {"expert load, min-max": 22, "time": 5}


class Report:
    """Writes to a console.

    Args:
        console: Where to; a terminal also gets the progress bar.
        columns: Name and width of the task's columns in the table.
        steps: Steps of the whole run.
        done: Steps already done when a run is resumed.
    """

    def __init__(self, console: Console, columns: dict[str, int], steps: int, done: int) -> None:
        bar = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self._console, self._columns = console, BEFORE | columns | BEHIND
        self._progress = Progress(
            *bar, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
        )
        self._task = self._progress.add_task("training", total=steps, completed=done)
        self._headed = False

    def __enter__(self) -> Report:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def step(self, loss: float) -> None:
        """One step is done."""
        self._progress.update(self._task, advance=1, description=f"loss {loss:.3f}")

    def epoch(self, line: dict[str, Any], epochs: int, cells: Sequence[str]) -> None:
        """The model was judged; `line` is its entry in the history, `cells` are what stands in the task's columns."""
        table = Table(box=box.SIMPLE_HEAD, show_header=not self._headed, pad_edge=False)
        for name, width in self._columns.items():
            table.add_column(name, width=width)
        loads = " ".join(f"{100 * min(layer):.1f}-{100 * max(layer):.1f}%" for layer in line["heldout_expert_shares"])
        table.add_row(f"{line['epoch']}/{epochs}", *cells, loads, f"{line['seconds']:.0f}s")
        self._headed = True
        self._console.print(table)
