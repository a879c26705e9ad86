"""`expertmesh demo`: the main job on real input, start to stop: what `make run` runs."""

from __future__ import annotations

from contextlib import aclosing
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from expertmesh import wire
from expertmesh.cli import placement, session
from expertmesh.cli.classify import read_lines
from expertmesh.client import Client
from expertmesh.errors import SetupError
from expertmesh.serving.inference import route_name
from expertmesh.v1.inference_pb2 import (
    CONTRACT_EXACT,
    CONTRACT_MESH_ONLY,
    ROUTE_FULL_MODEL,
    ROUTE_MESH,
    Classification,
    ClassifyResponse,
    GenerateRequest,
    Route,
)
from expertmesh.v1.sampling_pb2 import TokenLogprobs

SHOWN_CHARACTERS = 58
SHOWN_TOKENS = 120
SEED = 1


def demo(
    model: placement.Model = placement.DEFAULT_MODEL,
    file: Annotated[Path, typer.Option(help="Raw texts, one a line.")] = Path("examples/headlines.txt"),
    generator: Annotated[Path | None, typer.Option(help="A model that generates, to be shown as well.")] = None,
    prompt: Annotated[str, typer.Option(help="What it goes on from.")] = "ROMEO:",
) -> None:
    """Starts a mesh, classifies every text through both routes, compares the bits, stops everything."""
    texts = [line.text for line in read_lines(file) if not line.error]
    if not texts:
        raise SetupError(f"{file} holds no text")
    equal = session.run(_classify(model, texts))
    if generator is not None:
        print()
        equal &= session.run(_generate(generator, prompt))
    if not equal:
        raise typer.Exit(1)


async def _generate(model: Path, prompt: str) -> bool:
    wish = GenerateRequest(text=prompt, max_tokens=SHOWN_TOKENS, temperature=0.8, seed=SEED, logprobs=0)
    async with session.temporary_mesh(model, placement.read_options()) as mesh, Client(mesh.grpc) as client:
        _tell_processes(mesh)
        print(f"\n{prompt}", end="", flush=True)
        tokens: list[TokenLogprobs] = []
        async with aclosing(client.generate(_by(wish, ROUTE_MESH))) as messages:
            async for message in messages:
                print(message.text, end="", flush=True)
                tokens.extend(message.tokens)
        reference = (await client.complete(_by(wish, ROUTE_FULL_MODEL))).choices[0]
    equal = tokens == list(reference.tokens)
    if equal:
        print(f"\n\nboth routes gave the same {len(tokens)} tokens, and their log probabilities were bit-equal")
    else:
        print("\n\nTHE ROUTES DIFFER in tokens or log probabilities")
    return equal


def _by(wish: GenerateRequest, route: Route) -> GenerateRequest:
    request = GenerateRequest(route=route, contract=CONTRACT_MESH_ONLY if route == ROUTE_MESH else CONTRACT_EXACT)
    request.MergeFrom(wish)
    return request


def _tell_processes(mesh: session.Session) -> None:
    assert mesh.plan is not None
    names = ", ".join(process.name for process in mesh.plan.processes)
    print(f"{len(mesh.plan.processes)} processes are up: {names}")


async def _classify(model: Path, texts: list[str]) -> bool:
    async with session.temporary_mesh(model, placement.read_options()) as mesh, Client(mesh.grpc) as client:
        _tell_processes(mesh)
        through_mesh = await client.classify(texts, contract=CONTRACT_MESH_ONLY, include_experts=True)
        through_full = await client.classify(texts, route=ROUTE_FULL_MODEL, include_experts=True)
    _show(texts, through_mesh, through_full)
    equal = sum(
        _bits(left) == _bits(right) for left, right in zip(through_mesh.results, through_full.results, strict=True)
    )
    if equal == len(texts):
        print(f"both routes were bit-equal on all {len(texts)} texts")
    else:
        print(f"THE ROUTES DIFFER on {len(texts) - equal} of {len(texts)} texts")
    return equal == len(texts)


def _show(texts: list[str], through_mesh: ClassifyResponse, through_full: ClassifyResponse) -> None:
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    table = Table("headline", "label", "confidence", "route", "experts used, busiest first, per layer")
    for text, left, right in zip(texts, through_mesh.results, through_full.results, strict=True):
        shown = text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 1] + "…"
        table.add_row(Text(shown), left.label, f"{max(left.probabilities):.1%}", route_name(left.route), _experts(left))
        table.add_row("", right.label, f"{max(right.probabilities):.1%}", route_name(right.route), _experts(right))
    console.print(table)


def _experts(result: Classification) -> str:
    counts_LE = wire.decode(result.expert_tokens, wire.INT32, tuple(result.expert_tokens.shape), "expert_tokens")
    layers = []
    for counts_E in counts_LE:
        busiest = [int(expert) for expert in np.argsort(-counts_E, kind="stable") if counts_E[expert]]
        layers.append(" ".join(map(str, busiest)))
    return " | ".join(layers)


def _bits(result: Classification) -> bytes:
    return np.array([*result.logits, *result.probabilities], np.float32).tobytes()
