"""Generating with a Mixtral-like model: the mesh, the full_model service, and `transformers.generate`.

    python -m benchmarks.generate [--json FILE]

The model (hidden 512, 6 layers, 8 experts of width 1024, top-2, fp32) has random weights, is written by transformers
and split by the importer. 16 streams of 32 prompt tokens and 64 new ones go through the gateway with 8 expert services,
to the full model at its own address, and through transformers as one batch of 16 in a process with 2 threads, with the
fastest of its implementations of experts; all that run here are tried. With one stream the time between tokens tells
what the mesh adds to a layer.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from benchmarks.child import Child
from benchmarks.models import MIXTRAL_LAYERS, MIXTRAL_VOCAB, random_model
from benchmarks.report import JsonFile, Report, difference, ratio, spread
from benchmarks.rounds import in_turn
from expertmesh.cli import session
from expertmesh.cli.placement import read_options
from expertmesh.client import Client
from expertmesh.v1.inference_pb2 import (
    CONTRACT_EXACT,
    CONTRACT_MESH_ONLY,
    ROUTE_FULL_MODEL,
    ROUTE_MESH,
    GenerateRequest,
    TokenIds,
)

STREAMS, PROMPT_TOKENS, NEW_TOKENS, TRIED_TOKENS = 16, 32, 64, 8
EXPERT_SERVICES, THREADS = 8, 2
MESH, FULL = "mesh", "full model"
WAITS = ("passive", "active")  # how threads wait, as OpenMP calls it
# What is sent where: the way of a request, and the contract that keeps it there.
ROUTES = {MESH: (ROUTE_MESH, CONTRACT_MESH_ONLY), FULL: (ROUTE_FULL_MODEL, CONTRACT_EXACT)}


def main(
    rounds: Annotated[int, typer.Option(help="Rounds of each contender.")] = 5, json_file: JsonFile = None
) -> None:
    """Prints tokens per second of 16 streams, and milliseconds per token of one."""
    report = Report("generate")
    with random_model("mixtral") as model:
        session.run(_measure(model, rounds, report))
    report.publish(json_file)


async def _measure(model: Path, rounds: int, report: Report) -> None:
    random = np.random.default_rng(1)
    prompts = random.integers(2, MIXTRAL_VOCAB, (STREAMS, PROMPT_TOKENS)).tolist()
    async with AsyncExitStack() as stack:
        options = read_options(expert_services=EXPERT_SERVICES)
        running = await stack.enter_async_context(session.temporary_mesh(model, options))
        assert running.plan is not None
        mesh = Streams(await stack.enter_async_context(Client(running.grpc)), MESH)
        address = next(process.address for process in running.plan.processes if process.kind == "full_model")
        full = Streams(await stack.enter_async_context(Client(address)), FULL)
        theirs = await _fastest(stack, model.parent / "source", prompts, report)
        await _note_tokens(mesh, full, theirs, prompts, report)
        rates = await in_turn(
            {
                MESH: lambda: mesh.rate(prompts),
                FULL: lambda: full.rate(prompts),
                theirs.name: lambda: theirs.rate(prompts),
            },
            rounds,
        )
        times_ms = await in_turn(
            {MESH: lambda: mesh.token_ms(prompts[0]), FULL: lambda: full.token_ms(prompts[0])}, rounds
        )
    report.figures |= {"tokens_per_s": rates, "ms_per_token": times_ms}
    table = Table(f"{STREAMS} streams", "tokens/s", "of transformers", "one stream, ms per token")
    for name, figures in rates.items():
        share = statistics.median(figures) / statistics.median(rates[theirs.name])
        table.add_row(name, spread(figures), f"{share:.2f}", spread(times_ms[name]) if name in times_ms else "")
    report.tables.append(table)
    what = f"{STREAMS} streams: mesh / {theirs.name}"
    report.targets.append(ratio(what, rates[MESH], rates[theirs.name], at_least=1.5))
    what = "one stream: the mesh adds to a layer"
    share = 1 / MIXTRAL_LAYERS
    report.targets.append(difference(what, times_ms[MESH], times_ms[FULL], "ms", share, at_most=2.0))


class Streams:
    """A gateway or a full model that is asked to generate.

    Args:
        client: Connected to it.
        way: Which it is.
    """

    def __init__(self, client: Client, way: str) -> None:
        self._client = client
        self._route, self._contract = ROUTES[way]

    async def rate(self, prompts: Sequence[list[int]]) -> float:
        """Tokens per second of all prompts at once."""
        started_s = time.perf_counter()
        answers = await asyncio.gather(*(self.tokens(prompt) for prompt in prompts))
        return sum(map(len, answers)) / (time.perf_counter() - started_s)

    async def token_ms(self, prompt: list[int]) -> float:
        """Median milliseconds from one token of a stream to the next."""
        arrived_s: list[float] = []
        await self.tokens(prompt, arrived_s)
        return statistics.median(np.diff(arrived_s).tolist()) * 1e3

    async def tokens(self, prompt: list[int], arrived_s: list[float] | None = None) -> list[int]:
        """The tokens that follow, greedily; `arrived_s` is told when each came."""
        request = GenerateRequest(
            ids=TokenIds(ids=prompt),
            max_tokens=NEW_TOKENS,
            temperature=0.0,
            ignore_end=True,
            route=self._route,
            contract=self._contract,
        )
        ids: list[int] = []
        async for message in self._client.generate(request):
            for token in message.tokens:
                ids.append(token.id)
                if arrived_s is not None:
                    arrived_s.append(time.perf_counter())
        assert len(ids) == NEW_TOKENS
        return ids


class Transformers:
    """`transformers.generate` with one implementation of experts in one child."""

    def __init__(self, child: Child, implementation: str, wait: str) -> None:
        self._child = child
        self._implementation = implementation
        self.name = f"transformers, {implementation}, {wait} wait"

    async def rate(self, prompts: Sequence[list[int]], tokens: int = NEW_TOKENS) -> float:
        """Tokens per second of all prompts as one batch."""
        answer = await self._ask(prompts, tokens)
        return float(answer["rate"])

    async def tokens(self, prompts: Sequence[list[int]]) -> list[list[int]]:
        """The tokens that follow each prompt, greedily."""
        return [list(ids) for ids in (await self._ask(prompts, NEW_TOKENS))["tokens"]]

    async def _ask(self, prompts: Sequence[list[int]], tokens: int) -> Any:
        return await self._child.ask(implementation=self._implementation, prompts=prompts, tokens=tokens)


async def _fastest(stack: AsyncExitStack, source: Path, prompts: Sequence[list[int]], report: Report) -> Transformers:
    """Tries every implementation that runs here, with threads that wait asleep and spinning."""
    rates: dict[str, float] = {}
    contenders: list[Transformers] = []
    for wait in WAITS:
        environment = {"OMP_NUM_THREADS": str(THREADS), "OMP_WAIT_POLICY": wait}
        child = Child("benchmarks.generate_transformers", str(source), str(THREADS), environment=environment)
        await stack.enter_async_context(child)
        for implementation in await child.ask(implementations=True):
            contender = Transformers(child, implementation, wait)
            short = [prompt[:1] for prompt in prompts]
            await contender.rate(short, 2)
            rates[contender.name] = await contender.rate(short, TRIED_TOKENS)
            contenders.append(contender)
    report.figures["transformers_tried"] = rates
    told = "; ".join(f"{name} {rate:.0f}" for name, rate in rates.items())
    report.notes.append(f"tried once with {TRIED_TOKENS} tokens and no prompt, tokens/s: {told}")
    return max(contenders, key=lambda one: rates[one.name])


async def _note_tokens(
    mesh: Streams, full: Streams, theirs: Transformers, prompts: Sequence[list[int]], report: Report
) -> None:
    """Notes how much of what the contenders generate is the same."""
    by_mesh = await asyncio.gather(*map(mesh.tokens, prompts))
    by_full = await asyncio.gather(*map(full.tokens, prompts))
    by_them = await theirs.tokens(prompts)
    report.figures["same_answers"] = {
        name: sum(one == other for one, other in zip(by_mesh, answers, strict=True))
        for name, answers in ((FULL, by_full), ("transformers", by_them))
    }
    for name, same in report.figures["same_answers"].items():
        report.notes.append(f"{same} of {STREAMS} answers are the same as of {name}, token by token")


if __name__ == "__main__":
    typer.run(main)
