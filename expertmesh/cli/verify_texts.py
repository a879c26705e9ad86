"""`expertmesh verify` of a classifier: texts through both routes."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from expertmesh.cli import session
from expertmesh.cli.classify import read_lines
from expertmesh.client import Client
from expertmesh.errors import MeshError, SetupError
from expertmesh.local.plan import Options
from expertmesh.verification import compare

GENERATED_TEXTS = 200
MAX_WORDS = 300
CALL_TIMEOUT_S = 600
WORDS = (
    "market shares oil profit bank minister election army peace talks striker season coach goal final software chip",
    "internet satellite virus court police quarter growth deal rates league medal browser phone launch study 2004",
    "the of in on and for with after as Monday ... $46.50 U.S. 3-2 &amp; — é 中 \U0001f600",
)


@dataclass(frozen=True)
class Mesh:
    """The mesh that is proved: the one at an address, else one that is started and stopped again."""

    model: Path
    address: str
    options: Options

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        """A client of its gateway.

        Raises:
            SetupError: There is no such mesh, or a call failed.
        """
        if self.address:
            mesh = session.any_mesh(self.model, self.address, Path(), self.options)
        else:
            mesh = session.temporary_mesh(self.model, self.options)
        async with mesh as opened, Client(opened.grpc, timeout_s=CALL_TIMEOUT_S) as client:
            try:
                yield client
            except* MeshError as group:
                error = _first(group)
                raise (error if isinstance(error, SetupError) else SetupError(f"a call failed: {error}")) from None


async def verify(mesh: Mesh, inputs: Path | None, call_texts: int, callers: int) -> tuple[bool, str]:
    """Prints what came out; gives whether all is equal, and the numeric profile."""
    texts = read_texts(inputs) if inputs else make_texts(GENERATED_TEXTS)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("comparing", total=len(texts))
        async with mesh.client() as client:
            result = await compare(
                client, texts, call_texts, callers, lambda done: progress.update(task, completed=done)
            )
            profile = (await client.classify(texts[:1])).results[0].profile
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
        return False, profile
    print("mesh and full model are bit-equal")
    return True, profile


def read_texts(inputs: Path) -> list[str]:
    """Texts of a file, one a line.

    Raises:
        SetupError: There is none, or one is malformed.
    """
    texts = []
    for number, line in enumerate(read_lines(inputs), start=1):
        if line.error:
            raise SetupError(f"{inputs}, line {number}: {line.error}")
        texts.append(line.text)
    if not texts:
        raise SetupError(f"{inputs} holds no text")
    return texts


def make_texts(count: int, most_words: int = MAX_WORDS) -> list[str]:
    """Made-up texts, always the same."""
    chance = random.Random(0)  # noqa: S311
    words = " ".join(WORDS).split()
    return [" ".join(chance.choices(words, k=chance.randint(1, most_words))) for _ in range(count)]


def _first(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
