"""`expertmesh train`: from a CSV file, or from texts, to a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

if TYPE_CHECKING:
    from expertmesh.train.config import TrainConfig
    from expertmesh.train.task import Task


def train(
    config: Annotated[Path, typer.Argument(help="TOML file: [model], [tokenizer], [train], and [texts].")],
    data: Annotated[
        list[Path],
        typer.Option(
            "--train",
            help="For a classifier a CSV file of class,title,description; .xz is unpacked. For a language model a text "
            "file, of which the last tenth is held out; give the option again for further texts.",
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Folder that the checkpoint is written to.")],
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the state in --out, bit for bit.")] = False,
) -> None:
    """Train a Mixture-of-Experts classifier or language model; what it writes is ready to be split."""
    from expertmesh.errors import SetupError
    from expertmesh.train import checkpoint
    from expertmesh.train.config import TrainConfig
    from expertmesh.train.loop import Trainer

    settings = TrainConfig.load(config)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SetupError(f"{out} cannot be made: {error.strerror}") from None
    if not resume and (out / checkpoint.STATE_FILE).exists():
        raise SetupError(f"{out}: holds a training run already; go on with --resume, or name another folder")
    if resume and not (out / checkpoint.STATE_FILE).exists():
        raise SetupError(f"{out} holds no training run to resume")
    console = Console()
    make = _language if settings.model.generates else _classification
    task = make(settings, data, out / checkpoint.TOKENIZER_FOLDER, resume, console)
    digests = " ".join(map(checkpoint.file_digest, data))
    trainer: Trainer[Any] = Trainer(settings, task, digests, out, console)
    if resume:
        trainer.resume()
    heldout = trainer.run()["heldout"]
    if settings.model.generates:
        figure = f"{heldout['nats_per_character']:.4f} nats per character"
    else:
        figure = f"accuracy {100 * heldout['accuracy']:.2f} %"
    console.print(f"held-out data with {out / checkpoint.WEIGHTS_FILE}: {figure}")


def _classification(config: TrainConfig, data: list[Path], folder: Path, resume: bool, console: Console) -> Task[Any]:
    from expertmesh.errors import SetupError
    from expertmesh.tokenization.tokenizer import Tokenizer
    from expertmesh.train.classification import Classification
    from expertmesh.train.data import read_rows, split
    from expertmesh.train.vocabulary import make_tokenizer

    if len(data) != 1:
        raise SetupError(f"a classifier is trained on one file, not {len(data)}")
    parts = split(read_rows(data[0], len(config.model.head.labels)))
    if not (parts.training and parts.heldout):
        counts = f"{len(parts.training)} rows to train on and {len(parts.heldout)} held out"
        raise SetupError(f"{data[0]} gives {counts}; one row in twenty is held out: give more rows")
    console.print(f"{len(parts.training)} rows to train on, {len(parts.heldout)} held out")
    if resume:
        return Classification(config, parts, Tokenizer.load(folder))
    texts = [row.text for row in parts.training]
    return Classification(config, parts, make_tokenizer(texts, config.tokenizer, config.model.embedding.vocab, folder))


def _language(config: TrainConfig, data: list[Path], folder: Path, resume: bool, console: Console) -> Task[Any]:
    from expertmesh.train.language import Language
    from expertmesh.train.pieces import Pieces, make_pieces
    from expertmesh.train.texts import read_texts

    texts = read_texts(data)
    others = sum(map(len, texts.others))
    console.print(
        f"{len(texts.main)} characters to train on, {others} of other texts beside them, {len(texts.heldout)} held out"
    )
    if resume:
        return Language(config, texts, Pieces(folder))
    return Language(config, texts, make_pieces(texts.main, config.tokenizer, config.model.embedding.vocab, folder))
