"""A linear SVM on TF-IDF word uni- and bigrams: what a news classifier has to beat.

It learns from exactly the rows that `expertmesh train` learns from and is scored on the rows that are held out
(`expertmesh.train.data`). To compare a model with it row by row:

    python benchmarks/svm_baseline.py --train PATH/TO/train.csv --write-heldout heldout.txt
    expertmesh classify --file heldout.txt --json > predictions.jsonl
    python benchmarks/svm_baseline.py --train PATH/TO/train.csv --predictions predictions.jsonl

It does not run the model: predictions are one JSON object per held-out row, in order, with its class in `label`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

from expertmesh.errors import SetupError
from expertmesh.train.data import Row, Split, read_rows, split

Labels = npt.NDArray[np.int64]
LABELS = ("World", "Sports", "Business", "Sci/Tech")
Z_95 = 1.959964


def heldout_lines(rows: Sequence[Row]) -> list[str]:
    """Gives the raw text of each row on one line."""
    return [" ".join(row.text.splitlines()) or " " for row in rows]


def svm_predictions(parts: Split) -> Labels:
    """Trains the baseline and gives its classes of the held-out rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    features = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(features, LinearSVC(C=1.0, random_state=0))
    model.fit([row.text for row in parts.training], [row.label for row in parts.training])
    return np.asarray(model.predict([row.text for row in parts.heldout]), np.int64)


def read_predictions(path: Path, labels: Sequence[str], rows: int) -> Labels:
    """Reads JSON lines with `label`, a name among `labels`.

    Raises:
        SetupError: A line is not understood, or there are more or fewer than `rows`.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if len(lines) != rows:
        raise SetupError(f"{path}: {len(lines)} predictions for {rows} held-out rows")
    try:
        return np.array([labels.index(json.loads(line)["label"]) for line in lines], np.int64)
    except (ValueError, KeyError, TypeError) as error:
        raise SetupError(f"{path}: every line needs a 'label' among {', '.join(labels)} ({error})") from None


def wilson_interval(right: int, rows: int) -> tuple[float, float]:
    """The 95 % interval of a proportion (Wilson, 1927)."""
    share, z2 = right / rows, Z_95**2
    centre = (share + z2 / (2 * rows)) / (1 + z2 / rows)
    half = Z_95 * math.sqrt(share * (1 - share) / rows + z2 / (4 * rows**2)) / (1 + z2 / rows)
    return centre - half, centre + half


def mcnemar(first_B: npt.NDArray[np.bool_], second_B: npt.NDArray[np.bool_]) -> tuple[int, int, float]:
    """McNemar's exact test of two classifiers on the same rows.

    Args:
        first_B: Whether the first was right.
        second_B: Whether the second was right.

    Returns:
        Rows that only the first got right, rows that only the second did, and the two-sided p.
    """
    only_first, only_second = int((first_B & ~second_B).sum()), int((second_B & ~first_B).sum())
    rows = only_first + only_second
    tail = sum(math.comb(rows, count) for count in range(min(only_first, only_second) + 1))
    return only_first, only_second, min(1.0, 2 * tail / 2**rows)


def compare(parts: Split, predict: Callable[[], Labels] | None = None) -> dict[str, Any]:
    """Scores the baseline, and a model if there is one, on the held-out rows.

    Args:
        parts: Rows to learn from and to be scored on.
        predict: Gives the model's classes of the held-out rows, in order.
    """
    truth_B = np.array([row.label for row in parts.heldout])
    right = {"svm": svm_predictions(parts) == truth_B}
    if predict is not None:
        right["model"] = predict() == truth_B
    result: dict[str, Any] = {"rows": {"training": len(parts.training), "heldout": len(truth_B)}}
    for name, right_B in right.items():
        interval = wilson_interval(int(right_B.sum()), len(right_B))
        result[name] = {"accuracy": float(right_B.mean()), "interval_95": list(interval)}
    if predict is not None:
        only_model, only_svm, p = mcnemar(right["model"], right["svm"])
        result["paired"] = {"only_model_right": only_model, "only_svm_right": only_svm, "mcnemar_p": p}
    return result


def main(
    train: Annotated[Path, typer.Option("--train", help="CSV file of class,title,description.")],
    predictions: Annotated[Path | None, typer.Option("--predictions", help="The model's, as JSON lines.")] = None,
    write_heldout: Annotated[Path | None, typer.Option("--write-heldout", help="Writes the texts and stops.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Prints JSON.")] = False,
) -> None:
    """Score the baseline and a model on the same held-out rows."""
    parts = split(read_rows(train, len(LABELS)))
    if write_heldout is not None:
        write_heldout.write_text("\n".join(heldout_lines(parts.heldout)) + "\n", encoding="utf-8")
        return
    given = predictions and (lambda: read_predictions(predictions, LABELS, len(parts.heldout)))
    result = compare(parts, given or None)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    table = Table("", "accuracy", "95 % interval")
    for name in ("svm", "model"):
        if name in result:
            low, high = result[name]["interval_95"]
            table.add_row(name, f"{100 * result[name]['accuracy']:.2f} %", f"{100 * low:.2f} to {100 * high:.2f} %")
    console = Console()
    console.print(f"{result['rows']['training']} rows to learn from, {result['rows']['heldout']} held out", table)
    if "paired" in result:
        paired = result["paired"]
        console.print(
            f"only the model right: {paired['only_model_right']}, only the SVM right: {paired['only_svm_right']},"
            f" McNemar p = {paired['mcnemar_p']:.3f}"
        )


if __name__ == "__main__":
    typer.run(main)
