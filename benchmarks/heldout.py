"""The bundled model through the mesh beside a linear SVM on TF-IDF word uni- and bigrams, on the same rows.

    python -m benchmarks.heldout --train PATH/TO/train.csv [--model models/agnews] [--json FILE]

The SVM learns from exactly the rows that `expertmesh train` learns from; both are scored on the rows that it holds out
(`expertmesh.train.data`). Printed are accuracies with their 95 % intervals, a paired test, and the experts' load.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from rich.console import Console
from rich.table import Table

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.cli import placement, session
from expertmesh.cli.eval import label, show_load
from expertmesh.evaluation import fair_shares, wilson_interval
from expertmesh.local.state import default_folder
from expertmesh.train.data import Split, read_rows, split
from expertmesh.v1.inference_pb2 import ROUTE_MESH

Hits = npt.NDArray[np.bool_]


def main(
    train: Annotated[Path, typer.Option("--train", help="CSV file of class,title,description; .xz is unpacked.")],
    model: Annotated[Path, typer.Option("--model", help="Folder of the split model.")] = placement.DEFAULT_MODEL,
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures as JSON.")] = None,
) -> None:
    """Score the model and the SVM on the same held-out rows."""
    labels = Manifest.read(model).spec.head.labels
    parts = split(read_rows(train, len(labels)))
    print(f"{len(parts.training)} rows to learn from, {len(parts.heldout)} held out")
    texts = [row.text for row in parts.heldout]
    given = session.run(label(texts, ROUTE_MESH, "", default_folder(), model))
    truth_B = np.array([row.label for row in parts.heldout])
    mesh_hits_B = np.array([labels.index(name) for name in given.labels]) == truth_B
    svm_hits_B = svm_predictions(parts) == truth_B
    figures = {"mesh": score(mesh_hits_B), "svm": score(svm_hits_B), "paired": mcnemar(mesh_hits_B, svm_hits_B)}
    show(figures)
    show_load(given.tokens_LE)
    if json_file is not None:
        shares = fair_shares(given.tokens_LE).tolist()
        json_file.write_text(json.dumps({**figures, "fair_shares": shares}, indent=1))


def svm_predictions(parts: Split) -> npt.NDArray[np.int64]:
    """Trains the baseline and gives its classes of the held-out rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    features = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True)
    model = make_pipeline(features, LinearSVC(C=1.0, random_state=0))
    model.fit([row.text for row in parts.training], [row.label for row in parts.training])
    return np.asarray(model.predict([row.text for row in parts.heldout]), np.int64)


def score(hits_B: Hits) -> dict[str, Any]:
    """Accuracy and its 95 % interval."""
    return {"accuracy": float(hits_B.mean()), "interval_95": wilson_interval(int(hits_B.sum()), len(hits_B))}


def mcnemar(first_B: Hits, second_B: Hits) -> dict[str, Any]:
    """McNemar's exact test of two classifiers on the same rows: rows that only one has right, and the two-sided p."""
    only_first, only_second = int((first_B & ~second_B).sum()), int((second_B & ~first_B).sum())
    rows = only_first + only_second
    tail = sum(math.comb(rows, count) for count in range(min(only_first, only_second) + 1))
    return {"only_mesh_right": only_first, "only_svm_right": only_second, "p": min(1.0, 2 * tail / 2**rows)}


def show(figures: dict[str, Any]) -> None:
    """Prints the accuracies and the paired test."""
    table = Table("", "accuracy", "95 % interval")
    for name in ("mesh", "svm"):
        low, high = figures[name]["interval_95"]
        table.add_row(name, f"{figures[name]['accuracy']:.2%}", f"{low:.2%} to {high:.2%}")
    Console().print(table)
    paired = figures["paired"]
    print(
        f"only the mesh right: {paired['only_mesh_right']}, only the SVM right: {paired['only_svm_right']},"
        f" McNemar p = {paired['p']:.2f}"
    )


if __name__ == "__main__":
    typer.run(main)
