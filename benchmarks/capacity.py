"""Bytes, hops and gateways of real models, from what a call and a KiB cost; nothing is measured here.

    python -m benchmarks.capacity [--call-ms 0.35 --kib-us 0.9] [--page docs/capacity.md]

Prints the tables of docs/capacity.md, which says what they mean, or those of other costs; `--page` writes them there.
Letters: L layers, of which M have experts; D width; E experts, of which a token chooses K; S expert services; R rows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, comb
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markdown import Markdown

Rows = list[list[str]]

FLOAT32_BYTES = 4
ROUTE_BYTES = 8  # an int32 id and a float32 weight of each choice
STEP_ROWS = (1, 16, 256)
FEW_SERVICES = 8
TARGET_TOKENS_PER_S = 1000
BUSY = 0.7  # how busy a gateway should be on average, so that bursts do not queue
GOODPUT = 0.9  # of a NIC's rate, what is left for rows after headers and acknowledgements
NICS_GBIT = (25, 100)
HOPS_MS = (0.3, 1.0)


@dataclass(frozen=True)
class Model:
    """Sizes of a model, as its config.json has them; an expert has three matrices of width times expert_width."""

    name: str
    layers: int
    dense_layers: int
    width: int
    experts: int
    top_k: int
    expert_width: int

    @property
    def sparse_layers(self) -> int:
        """M, the layers that have experts."""
        return self.layers - self.dense_layers

    @property
    def hops(self) -> int:
        """Round trips of a step, one after another: embedding, gating of each layer, experts of each, head."""
        return self.layers + self.sparse_layers + 2

    @property
    def expert_weights(self) -> int:
        """Weights of all experts of all layers, without biases."""
        return self.sparse_layers * self.experts * 3 * self.width * self.expert_width


MODELS = (
    Model("Mixtral-8x7B", 32, 0, 4096, 8, 2, 14336),
    Model("OLMoE-1B-7B", 16, 0, 2048, 64, 8, 1024),
    Model("Qwen3-30B-A3B", 48, 0, 2048, 128, 8, 768),
    Model("DeepSeek-V2-Lite", 27, 1, 2048, 64, 6, 1408),
    Model("gpt-oss-20b", 24, 0, 2880, 32, 4, 2880),
)


@dataclass(frozen=True)
class Dtypes:
    """Bytes of one number of what gating gives to experts, and of what travels to them and back."""

    name: str
    model_bytes: int
    wire_bytes: int


FLOAT32 = Dtypes("float32", 4, 4)
NARROWED = Dtypes("float32, wire bfloat16", 4, 2)
BFLOAT16 = Dtypes("bfloat16", 2, 2)


@dataclass(frozen=True)
class Traffic:
    """Bytes that leave the gateway and that come to it."""

    out_bytes: int
    in_bytes: int

    @property
    def kib(self) -> float:
        """Of both directions."""
        return (self.out_bytes + self.in_bytes) / 1024


@dataclass(frozen=True)
class Cost:
    """What the gateway's processor pays."""

    carrier: str
    call_ms: float
    kib_us: float

    def step_ms(self, calls: float, kib: float) -> float:
        """Of a step of so many calls and KiB."""
        return calls * self.call_ms + kib * self.kib_us / 1000


# To be measured again where the code of links changes.
SOCKETS = Cost("unix sockets", call_ms=0.25, kib_us=0.4)
STREAMS = Cost("TCP streams", call_ms=0.35, kib_us=0.9)


def gating_traffic(model: Model, dtypes: Dtypes) -> Traffic:
    """Of one row in one layer that has experts: the residual goes and comes; input, ids and weights come."""
    residual = FLOAT32_BYTES * model.width
    return Traffic(residual, residual + dtypes.model_bytes * model.width + ROUTE_BYTES * model.top_k)


def expert_traffic(model: Model, dtypes: Dtypes) -> Traffic:
    """Of one row in one layer: it goes to each of its experts, also to two in one service, and comes from each."""
    rows = model.top_k * dtypes.wire_bytes * model.width
    return Traffic(rows, rows)


def token_traffic(model: Model, dtypes: Dtypes) -> Traffic:
    """Of one row from its embedding to the choice of a token."""
    residual = FLOAT32_BYTES * model.width
    gating, expert = gating_traffic(model, dtypes), expert_traffic(model, dtypes)
    alone = residual * (model.dense_layers + 1)  # dense layers both ways; to the head; from the embedding
    return Traffic(
        alone + model.sparse_layers * (gating.out_bytes + expert.out_bytes),
        alone + model.sparse_layers * (gating.in_bytes + expert.in_bytes),
    )


def services_reached(model: Model, services: int, rows: int) -> float:
    """Expert services that a step reaches in a layer, on average, where all sets of K experts are equally likely.

    A service that holds h experts is passed over by a token with C(E-h, K) of C(E, K) choices, and by a step if every
    one of its rows does. Experts are spread as `expertmesh up` spreads them.
    """
    reached = 0.0
    for group in range(services):
        held = (group + 1) * model.experts // services - group * model.experts // services
        passed_over = comb(model.experts - held, model.top_k) / comb(model.experts, model.top_k)
        reached += 1 - passed_over**rows
    return reached


def step_calls(model: Model, services: int, rows: int) -> float:
    """Messages of a step: to embedding and head, to gating in each layer, to each expert service that has rows."""
    return 2 + model.layers + model.sparse_layers * services_reached(model, services, rows)


def gateway_tokens_per_s(model: Model, dtypes: Dtypes, cost: Cost, services: int, rows: int) -> float:
    """What one core of a gateway carries in steps of so many rows, each of which gives a token."""
    step_ms = cost.step_ms(step_calls(model, services, rows), rows * token_traffic(model, dtypes).kib)
    return rows / step_ms * 1000


def gateways(tokens_per_s: float, core_tokens_per_s: float) -> int:
    """Gateways that carry so much without being busier than they should be."""
    return ceil(tokens_per_s / (BUSY * core_tokens_per_s))


def nic_tokens_per_s(model: Model, dtypes: Dtypes, gbit_per_s: float) -> float:
    """What a NIC of so much each way carries; the busier direction decides."""
    traffic = token_traffic(model, dtypes)
    return GOODPUT * gbit_per_s * 1e9 / 8 / max(traffic.out_bytes, traffic.in_bytes)


def tables(costs: Sequence[Cost]) -> dict[str, Rows]:
    """All tables by name, each with its heads first."""
    free = {"bytes": _bytes(), "calls": _calls(), "memory": _memory(), "latency": _latency()}
    of_last = {"gateways": _gateways(costs[-1]), "nic": _nic(costs[-1])}
    return {**free, "costs": _costs(costs), "core": _core(costs), **of_last}


def _bytes() -> Rows:
    rows = [["model", "dtype", "to gating", "from gating", "to experts", "from experts", "MB a token out", "MB in"]]
    for model in MODELS:
        for dtypes in (FLOAT32, NARROWED, BFLOAT16):
            gating, expert, token = (of(model, dtypes) for of in (gating_traffic, expert_traffic, token_traffic))
            layer = [f"{size:,}" for of in (gating, expert) for size in (of.out_bytes, of.in_bytes)]
            whole = [f"{size / 1e6:.2f}" for size in (token.out_bytes, token.in_bytes)]
            rows.append([model.name, dtypes.name, *layer, *whole])
    return rows


def _layouts(model: Model) -> list[int]:
    return sorted({FEW_SERVICES, model.experts})


def _calls() -> Rows:
    rows = [["model", "hops", "S", *(f"reached, R={r}" for r in STEP_ROWS), *(f"calls, R={r}" for r in STEP_ROWS)]]
    for model in MODELS:
        for services in _layouts(model):
            reached = [f"{services_reached(model, services, r):.1f}" for r in STEP_ROWS]
            calls = [f"{step_calls(model, services, r):,.0f}" for r in STEP_ROWS]
            rows.append([model.name, str(model.hops), str(services), *reached, *calls])
    return rows


def _costs(costs: Sequence[Cost]) -> Rows:
    rows = [["link", "c_call, ms of CPU a call", "c_KiB, µs of CPU a KiB"]]
    return rows + [[cost.carrier, f"{cost.call_ms:g}", f"{cost.kib_us:g}"] for cost in costs]


def _core(costs: Sequence[Cost]) -> Rows:
    rows = [["model", "S", *(f"{cost.carrier}, R={r}" for cost in costs for r in STEP_ROWS)]]
    for model in MODELS:
        for services in _layouts(model):
            rates = [gateway_tokens_per_s(model, FLOAT32, cost, services, r) for cost in costs for r in STEP_ROWS]
            rows.append([model.name, str(services), *(f"{rate:,.0f}" for rate in rates)])
    return rows


def _gateways(cost: Cost) -> Rows:
    cells = [(dtypes, r) for dtypes in (FLOAT32, BFLOAT16) for r in STEP_ROWS[1:]]
    rows = [["model", "S", *(f"{dtypes.name}, R={r}" for dtypes, r in cells)]]
    for model in MODELS:
        for services in _layouts(model):
            rates = [gateway_tokens_per_s(model, dtypes, cost, services, r) for dtypes, r in cells]
            rows.append([model.name, str(services), *(str(gateways(TARGET_TOKENS_PER_S, rate)) for rate in rates)])
    return rows


def _nic(cost: Cost) -> Rows:
    cells = [(dtypes, gbit) for dtypes in (FLOAT32, BFLOAT16) for gbit in NICS_GBIT]
    rows = [["model", *(f"{dtypes.name}, {gbit} Gbit" for dtypes, gbit in cells), "cores that fill the first"]]
    for model in MODELS:
        rates = [nic_tokens_per_s(model, dtypes, gbit) for dtypes, gbit in cells]
        core = gateway_tokens_per_s(model, FLOAT32, cost, FEW_SERVICES, STEP_ROWS[-1])
        rows.append([model.name, *(f"{rate:,.0f}" for rate in rates), f"{rates[0] / core:.1f}"])
    return rows


def _memory() -> Rows:
    cells = [(dtypes, layout) for dtypes in (FLOAT32, BFLOAT16) for layout in (f"S={FEW_SERVICES}", "S=E")]
    rows = [["model", "weights", *(f"{dtypes.name}, {layout}" for dtypes, layout in cells)]]
    for model in MODELS:
        services = {"S=E": model.experts}
        sizes = [dtypes.model_bytes * model.expert_weights / services.get(s, FEW_SERVICES) for dtypes, s in cells]
        rows.append([model.name, f"{model.expert_weights / 1e9:.1f} billion", *(f"{s / 1e9:.2f} GB" for s in sizes)])
    return rows


def _latency() -> Rows:
    rows = [["model", "hops", *(f"ms a token at {hop:g} ms" for hop in HOPS_MS), "tokens/s of one stream"]]
    for model in MODELS:
        least_ms = [model.hops * hop for hop in HOPS_MS]
        rates = " to ".join(f"{1000 / ms:.0f}" for ms in reversed(least_ms))
        rows.append([model.name, str(model.hops), *(f"{ms:.0f}" for ms in least_ms), rates])
    return rows


def markdown(table: Rows) -> str:
    """A table as pages have it, figures to the right."""
    heads, *rows = table
    rule = ["---", *["--:"] * (len(heads) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows))


def rewritten(page: str, named: dict[str, Rows]) -> str:
    """The page with every table that stands under a mark of its name replaced.

    Raises:
        ValueError: A table has no place in it.
    """
    for name, table in named.items():
        mark = f"<!-- table: {name} -->\n"
        page, count = re.subn(rf"{mark}\n(\|.*\n)*", f"{mark}\n{markdown(table)}\n", page)
        if count != 1:
            raise ValueError(f"the page has {count} places for the table {name!r}")
    return page


def main(
    call_ms: Annotated[float | None, typer.Option(help="CPU that a call costs the gateway, ms.")] = None,
    kib_us: Annotated[float | None, typer.Option(help="CPU that a KiB costs it, µs.")] = None,
    page: Annotated[Path | None, typer.Option(help="Write the tables into this page.")] = None,
) -> None:
    """Prints the tables."""
    if (call_ms is None) != (kib_us is None):
        raise typer.BadParameter("--call-ms and --kib-us belong together")
    costs = (SOCKETS, STREAMS) if call_ms is None or kib_us is None else (Cost("yours", call_ms, kib_us),)
    named = tables(costs)
    if page is not None:
        page.write_text(rewritten(page.read_text(), named))
    console = Console(width=None if Console().is_terminal else 160, highlight=False)
    for name, table in named.items():
        console.print(Markdown(f"**{name}**\n\n{markdown(table)}"))


if __name__ == "__main__":
    typer.run(main)
