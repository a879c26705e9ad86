"""`expertmesh train`: from a CSV file to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def train(
    config: Annotated[Path, typer.Argument(help="TOML file: [model], [tokenizer] and [train].")],
    data: Annotated[Path, typer.Option("--train", help="CSV file of class,title,description; .xz is unpacked.")],
    out: Annotated[Path, typer.Option("--out", help="Folder that the checkpoint is written to.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state in --out, bit for bit.")] = False,
) -> None:
    """Train a Mixture-of-Experts classifier; what it writes is ready to be split."""
    from expertmesh.errors import SetupError
    from expertmesh.tokenization.tokenizer import Tokenizer
    from expertmesh.train import checkpoint
    from expertmesh.train.config import TrainConfig
    from expertmesh.train.data import read_rows, split
    from expertmesh.train.loop import Trainer
    from expertmesh.train.vocabulary import make_tokenizer

    settings = TrainConfig.load(config)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"{out} cannot be made: {error.strerror}") from None
    if not resume and (out / checkpoint.STATE_FILE).exists():
        raise SetupError(f"{out}: holds a training run already; go on with --resume, or name another folder")
    console = Console()
    parts = split(read_rows(data, len(settings.model.head.labels)))
    if not (parts.training and parts.heldout):
        counts = f"{len(parts.training)} rows to train on and {len(parts.heldout)} held out"
        raise SetupError(f"{data} gives {counts}; one row in twenty is held out: give more rows")
    console.print(f"{len(parts.training)} rows to train on, {len(parts.heldout)} held out")
    folder = out / checkpoint.TOKENIZER_FOLDER
    if resume:
        if not (out / checkpoint.STATE_FILE).exists():
            raise SetupError(f"{out} holds no training run to resume")
        tokenizer = Tokenizer.load(folder)
    else:
        texts = [row.text for row in parts.training]
        tokenizer = make_tokenizer(texts, settings.tokenizer, settings.model.embedding.vocab, folder)
    trainer = Trainer(settings, parts, checkpoint.file_digest(data), tokenizer, out, console)
    if resume:
        trainer.resume()
    report = trainer.run()
    console.print(f"held-out accuracy of {out / checkpoint.WEIGHTS_FILE}: {100 * report['heldout']['accuracy']:.2f} %")
