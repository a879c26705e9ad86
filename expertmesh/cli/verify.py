"""`expertmesh verify`: mesh against full model, bit by bit."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import Progress

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.cli import placement, session
from expertmesh.cli.classify import read_lines
from expertmesh.client import Client
from expertmesh.errors import MeshError, SetupError
from expertmesh.local.plan import Options
from expertmesh.verification import Comparison, compare

GENERATED_TEXTS = 200
MAX_WORDS = 300
WORDS = (
    "market shares oil profit bank minister election army peace talks striker season coach goal final software chip",
    "internet satellite virus court police quarter growth deal rates league medal browser phone launch study 2004",
    "the of in on and for with after as Monday ... $46.50 U.S. 3-2 &amp; — é 中 \U0001f600",
)


def verify(
    model: placement.Model = placement.DEFAULT_MODEL,
    inputs: Annotated[Path | None, typer.Option(help="Raw texts, one a line; by default 200 made-up ones.")] = None,
    call_texts: Annotated[int, typer.Option("--call-texts", help="Texts in one call.", min=1, max=1024)] = 32,
    callers: Annotated[int, typer.Option(help="Calls under way at once.", min=1, max=256)] = 4,
    expert_services: placement.ExpertServices = 0,
    replicas: placement.Replicas = None,
    device: placement.Devices = None,
    address: Annotated[str, typer.Option(help="gRPC address of a gateway; by default a mesh is started for it.")] = "",
    record: Annotated[bool, typer.Option("--record", help="Note the profile in the manifest if all is equal.")] = False,
) -> None:
    """Exits with 0 if every bit is equal, with 1 if one differs, with 2 if it could not be found out."""
    texts = _read(inputs) if inputs else _generate()
    options = placement.read_options(expert_services, replicas, device, inspect=True)
    result, profile = session.run(_verify(model, texts, call_texts, callers, options, address))
    print(f"texts compared      {result.texts}")
    print(f"differ              {len(result.differing)} of {result.texts}")
    print(f"largest difference  {result.largest:g}")
    print(f"profile             {profile}")
    if result.first is not None:
        print(f"first difference    {result.first}")
    elif result.differing:
        print(f"first difference    text {result.differing[0]} (switch inspection on to name the layer and expert)")
    if result.inexact:
        print(f"not exact           {result.inexact} answers said that they mix numeric profiles")
    if result.differing or result.inexact:
        raise typer.Exit(1)
    print("mesh and full model are bit-equal")
    if record:
        replace(Manifest.read(model), verified_on=profile).write(model)


async def _verify(
    model: Path, texts: list[str], call_texts: int, callers: int, options: Options, address: str
) -> tuple[Comparison, str]:
    Manifest.read(model)
    mesh = session.any_mesh(model, address, Path(), options) if address else session.temporary_mesh(model, options)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        async with mesh as opened, Client(opened.grpc, timeout_s=300) as client:
            task = progress.add_task("comparing", total=len(texts))
            try:
                result = await compare(
                    client, texts, call_texts, callers, lambda done: progress.update(task, completed=done)
                )
                answer = await client.classify(texts[:1])
            except* MeshError as group:
                raise SetupError(f"a call failed: {group.exceptions[0]}") from None
    return result, answer.results[0].profile


def _read(inputs: Path) -> list[str]:
    texts = []
    for number, line in enumerate(read_lines(inputs), start=1):
        if line.error:
            raise SetupError(f"{inputs}, line {number}: {line.error}")
        texts.append(line.text)
    if not texts:
        raise SetupError(f"{inputs} holds no text")
    return texts


def _generate() -> list[str]:
    chance = random.Random(0)  # noqa: S311
    words = " ".join(WORDS).split()
    return [" ".join(chance.choices(words, k=chance.randint(1, MAX_WORDS))) for _ in range(GENERATED_TEXTS)]
