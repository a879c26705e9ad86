"""Models with random weights, made in a process of its own, so that a benchmark's own process need not hold torch.

    python -m benchmarks.models layer FOLDER
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.child import ROOT
from benchmarks.layer_case import EXPERT_WIDTH, EXPERTS, TOP_K, WIDTH
from expertmesh.model.spec import AttentionSpec, EmbeddingSpec, ExpertSpec, HeadSpec, ModelSpec, RouterSpec

HEADLINES = ROOT / "examples" / "headlines.txt"
LAYER = ModelSpec(
    width=WIDTH,
    layers=1,
    context=64,
    embedding=EmbeddingSpec(vocab=1),
    attention=AttentionSpec(heads=8),
    router=RouterSpec(experts=EXPERTS, top_k=TOP_K),
    expert=ExpertSpec(width=EXPERT_WIDTH),
    head=HeadSpec(labels=("first", "second")),
)


@contextmanager
def random_model(name: str) -> Iterator[Path]:
    """The folder of a split model, which goes away again; beside it the folder `source` that it was split from."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        subprocess.run([sys.executable, "-m", __name__, name, folder], check=True, cwd=ROOT)
        yield Path(folder) / "split"


def classifier(spec: ModelSpec) -> Callable[[Path], None]:
    """Writes a classifier of this spec, but for the size of its vocabulary."""

    def write(folder: Path) -> None:
        import safetensors.torch
        import torch

        from expertmesh.checkpoint.split import SPEC_FILE, WEIGHTS_FILE
        from expertmesh.model.full import FullModel
        from expertmesh.train.config import TokenizerConfig
        from expertmesh.train.vocabulary import make_tokenizer

        tokenizer = make_tokenizer(HEADLINES.read_text().splitlines(), TokenizerConfig(), 500, folder / "tokenizer")
        sized = replace(spec, embedding=replace(spec.embedding, vocab=tokenizer.vocab))
        torch.manual_seed(1)
        weights = FullModel(sized).state_dict()
        (folder / SPEC_FILE).write_text(json.dumps(sized.to_dict()))
        safetensors.torch.save_file(
            {name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS_FILE
        )

    return write


WRITERS = {"layer": classifier(LAYER)}


def main(name: str, folder: str) -> None:
    """Writes and splits a model."""
    from expertmesh.checkpoint.split import split

    source = Path(folder) / "source"
    source.mkdir()
    WRITERS[name](source)
    split(source, Path(folder) / "split")


if __name__ == "__main__":
    main(*sys.argv[1:])
