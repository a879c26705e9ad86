"""What CUDA changes and costs: rows whose bits depend on their company, products, groups, recordings, pinned memory.

    python benchmarks/gpu.py [--json FILE]

Plain torch and ours stand side by side in one run on one card. Times of products are of the device alone: many are
recorded as one CUDA graph, which is replayed. Times of steps and copies are by the clock, with the waiting; medians.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from expertmesh.errors import SetupError
from expertmesh.model import cuda, invariant
from expertmesh.model.arrays import to_arrays, to_torch
from expertmesh.model.cache import KeyValueCache, blocks_of
from expertmesh.model.cached_sequences import CachedSequences
from expertmesh.model.experts import ExpertGroup
from expertmesh.model.full import FullModel
from expertmesh.model.graphs import Graphs
from expertmesh.model.layers import DTYPES, GatedMLP, RMSNorm, narrow
from expertmesh.model.router import route
from expertmesh.model.spec import AttentionSpec, EmbeddingSpec, ExpertSpec, HeadSpec, ModelSpec, NormSpec, RotarySpec
from expertmesh.model.spec import RouterSpec as Router
from expertmesh.model.tiles import Span

MOST_ROWS = 300
TILE_ROWS = 64
WIDTHS = ((64, 8), (192, 256), (512, 1024), (1024, 512), (512, 32_000))
TIMED = (1, 16, 64, 256, 2048)
DEVICE = torch.device("cuda")


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Also write the figures as JSON.")] = None,
) -> None:
    """Prints tables."""
    if not torch.cuda.is_available():
        raise SetupError("there is no CUDA device")
    results: dict[str, Any] = {"card": torch.cuda.get_device_name(DEVICE), "torch": torch.__version__}
    print(results)
    with torch.inference_mode():
        for name, measure in (
            ("row counts with changed rows", _company),
            ("products, us", _products),
            ("experts, us", _experts),
            ("decode step, ms", _decode),
            ("there and back, us", _copies),
        ):
            started_s = time.perf_counter()
            results[name] = measure()
            print(f"\n{name} ({time.perf_counter() - started_s:.0f} s)")
            for row, figures in results[name].items():
                print(f"  {row:44}", "  ".join(f"{column} {figure}" for column, figure in figures.items()))
            if json_file is not None:
                json_file.write_text(json.dumps(results, indent=1))


@contextmanager
def plain() -> Any:
    """Everything as torch has it on CUDA."""
    with mock.patch.object(cuda, "serves", return_value=False):
        yield


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers, the same for the same shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


# Rows and their company


def _company() -> dict[str, dict[str, str]]:
    table: dict[str, dict[str, str]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        for width, outputs in WIDTHS:
            x, weight = normal(MOST_ROWS, width).to(dtype), normal(outputs, width).to(dtype)
            ways: dict[str, Callable[[Tensor], Tensor]] = {
                "plain": partial(F.linear, weight=weight),
                "padded to 8": partial(_padded, weight, 8),
                "padded to 64": partial(_padded, weight, 64),
                "padded to 512": partial(_padded, weight, 512),
                "tiles of 64": partial(_in_tiles, weight),
                "ours": partial(invariant.linear, weight_OD=weight),
            }
            table[f"linear {width} to {outputs} {name}"] = {way: changed(do, x) for way, do in ways.items()}
        spec = ExpertSpec(width=1024)
        expert = narrow(GatedMLP(512, spec).eval().to(DEVICE), dtype)
        table[f"expert 512, 1024 {name}"] = _both(expert, normal(MOST_ROWS, 512).to(dtype))
        keys = normal(MOST_ROWS, 64, 128).to(dtype)
        queries = normal(MOST_ROWS, 8, 64).to(dtype)
        table[f"bmm [N, 8, 64] by [N, 64, 128] {name}"] = {
            "plain": _groups_changed(torch.bmm, queries, keys),
            "ours": _groups_changed(invariant.products, queries, keys),
        }
        table[f"attention, 3 blocks, rows 1 to 64 {name}"] = {}
        with plain():
            table[f"attention, 3 blocks, rows 1 to 64 {name}"]["plain"] = _attention_changed(dtype)
        table[f"attention, 3 blocks, rows 1 to 64 {name}"]["ours"] = _attention_changed(dtype)
    for width in (8, 64, 128, 512, 2048, 8192):
        x = normal(MOST_ROWS, width)
        norm = RMSNorm(width, 1e-5).to(DEVICE)
        table[f"sum of {width}"] = _both(invariant.row_sums, x)
        table[f"RMS norm of {width}"] = _both(norm, x)
        for way, do in (
            ("softmax", partial(torch.softmax, dim=-1)),
            ("layer norm", partial(F.layer_norm, normalized_shape=(width,))),
            ("exp", torch.exp),
            ("torch.silu", F.silu),
            ("silu", invariant.silu),
        ):
            table[f"{way} of {width}"] = {"plain": changed(do, x)}
    for experts in (8, 64, 128):
        for score in ("softmax", "sigmoid", "softmax_top"):
            router = Router(experts=experts, top_k=min(8, experts), score=score)
            do = partial(_route, router)
            table[f"{score} routes, {experts} experts"] = {"plain": changed(do, normal(MOST_ROWS, experts))}
    x_NLD = normal(MOST_ROWS, 32, 192)
    table["sum over 32 tokens of 192"] = {"plain": changed(partial(torch.sum, dim=1), x_NLD)}
    return table


def changed(do: Callable[[Tensor], Tensor], x: Tensor) -> str:
    """At how many counts of rows, of those up to len(x), some row has other bits than alone."""
    alone = _bits(torch.cat([do(row[None]) for row in x]))
    flags = [(_bits(do(x[:count])) != alone[:count]).any() for count in range(1, len(x) + 1)]
    return f"{int(torch.stack(flags).sum())}/{len(x)}"


def _both(do: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, str]:
    with plain():
        before = changed(do, x)
    return {"plain": before, "ours": changed(do, x)}


def _bits(x: Tensor) -> Tensor:
    return x.contiguous().view(torch.int16 if x.dtype == torch.bfloat16 else torch.int32)


def _padded(weight: Tensor, multiple: int, x: Tensor) -> Tensor:
    return F.linear(F.pad(x, (0, 0, 0, -len(x) % multiple)), weight)[: len(x)]


def _in_tiles(weight: Tensor, x: Tensor) -> Tensor:
    tiles = torch.split(F.pad(x, (0, 0, 0, -len(x) % TILE_ROWS)), TILE_ROWS)
    return torch.cat([F.linear(tile, weight) for tile in tiles])[: len(x)]


def _groups_changed(do: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> str:
    alone = _bits(torch.cat([do(x[group : group + 1], y[group : group + 1]) for group in range(len(x))]))
    flags = [(_bits(do(x[:count], y[:count])) != alone[:count]).any() for count in range(1, len(x) + 1)]
    return f"{int(torch.stack(flags).sum())}/{len(x)}"


def _attention_changed(dtype: torch.dtype) -> str:
    """The last query of a sequence of 300 tokens: alone, and as the last of up to 64."""
    q, k, v = (
        normal(1, 2, 64, 64).to(dtype),
        normal(1, 3, 2, 128, 64, seed=1).to(dtype),
        normal(1, 3, 2, 128, 64, seed=2),
    )
    places = torch.arange(3 * 128, device=DEVICE).view(1, 3, 1, 128)

    def last(rows: int) -> Tensor:
        padded = -(-rows // 8) * 8
        taken = q[:, :, 64 - rows :]
        taken = torch.cat([taken, taken[:, :, -1:].expand(-1, -1, padded - rows, -1)], dim=2)
        positions = torch.clamp(torch.arange(300 - rows, 300 - rows + padded, device=DEVICE), max=299)
        hidden = places > positions[:, None]
        return invariant.causal_attention(taken, k, v.to(dtype), hidden, 0.125)[:, :, rows - 1]

    alone = last(1)
    return f"{sum(not torch.equal(last(rows), alone) for rows in range(1, 65))}/64"


def _route(router: Router, logits_TE: Tensor) -> Tensor:
    ids_TK, weights_TK = route(logits_TE, router)
    return torch.cat([ids_TK.float(), weights_TK], dim=1)


# Times


def on_device_us(do: Callable[[], Any], calls: int = 20, rounds: int = 9) -> float:
    """Microseconds of the device for one call."""
    do()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            do()
    graph.replay()
    times: list[float] = []
    for _ in range(rounds):
        begin, end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / calls)
    return round(statistics.median(times), 1)


def by_the_clock_us(do: Callable[[], Any], rounds: int = 60) -> float:
    """Microseconds of one call until the device has done it."""
    times = []
    for _ in range(rounds + 10):
        torch.cuda.synchronize()
        started_s = time.perf_counter()
        do()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - started_s) * 1e6)
    return round(statistics.median(times[10:]), 1)


def _products() -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for width, outputs in ((512, 1024), (2048, 1024), (4096, 14_336)):
            weight = normal(outputs, width).to(dtype)
            for rows in TIMED:
                x = normal(rows, width).to(dtype)
                ways: dict[str, Callable[[], Any]] = {
                    "plain": partial(F.linear, x, weight),
                    "tiles of 64": partial(_in_tiles, weight, x),
                    "ours": partial(invariant.linear, x, weight),
                }
                name = f"{rows} rows, {width} to {outputs} {str(dtype).removeprefix('torch.')}"
                table[name] = {way: on_device_us(do) for way, do in ways.items()}
                table[name]["ours with launch"] = by_the_clock_us(ways["ours"], 20)
                table[name]["plain with launch"] = by_the_clock_us(ways["plain"], 20)
    return table


def _experts() -> dict[str, dict[str, float]]:
    """8 experts of one layer, top-2: one after another by torch and by ours, together, together and recorded."""
    table: dict[str, dict[str, float]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        held = {e: narrow(GatedMLP(512, ExpertSpec(width=1024)).eval().to(DEVICE), dtype) for e in range(8)}
        together, recorded = ExpertGroup(held), ExpertGroup(held, Graphs())
        for tokens in (1, 16, 64, 256):
            owners = np.sort(np.random.default_rng(tokens).integers(0, 8, 2 * tokens))
            ids, counts = (part.tolist() for part in np.unique(owners, return_counts=True))
            rows = normal(2 * tokens, 512).to(dtype)
            loop = partial(_one_by_one, held, ids, counts, rows)
            with plain():
                plainly = by_the_clock_us(loop)
            table[f"{tokens} tokens {str(dtype).removeprefix('torch.')}"] = {
                "plain loop": plainly,
                "our loop": by_the_clock_us(loop),
                "together": by_the_clock_us(partial(together, ids, counts, rows)),
                "together, recorded": by_the_clock_us(partial(recorded, ids, counts, rows)),
            }
    return table


def _one_by_one(held: dict[int, GatedMLP], ids: list[int], counts: list[int], rows_ND: Tensor) -> Tensor:
    return torch.cat([held[one](piece) for one, piece in zip(ids, torch.split(rows_ND, counts), strict=True)])


def _decode() -> dict[str, dict[str, float]]:
    """A Mixtral-type model with random weights, one token of each stream behind 200 cached ones."""
    table: dict[str, dict[str, float]] = {}
    for dtype in ("float32", "bfloat16"):
        spec = ModelSpec(
            width=512,
            layers=6,
            context=1024,
            embedding=EmbeddingSpec(32_000, learned_positions=False),
            attention=AttentionSpec(heads=8, kind="grouped", kv_heads=4, head_width=64),
            router=Router(experts=8, top_k=2),
            expert=ExpertSpec(width=1024),
            head=HeadSpec(kind="language", end_ids=(2,)),
            norm=NormSpec(1e-5, "rms"),
            rotary=RotarySpec(tuple(10_000.0 ** (-pair / 32) for pair in range(32))),
            dtype=dtype,
        )
        torch.manual_seed(0)
        model = narrow(FullModel(spec).eval().requires_grad_(False), DTYPES[dtype]).to(DEVICE)
        for streams in (1, 16):
            step = partial(_step, model, streams, KeyValueCache(spec, 2 * streams, DEVICE))
            figures = {}
            for way, graphs in (("plain", None), ("ours", None), ("ours, recorded", Graphs())):
                model.graphs = graphs
                model.__dict__.pop("_groups", None)
                stages: Any = model.gating
                for stage in stages:
                    stage.graphs = graphs
                if way == "plain":
                    with plain():
                        figures[way] = round(by_the_clock_us(step, 30) / 1000, 2)
                else:
                    figures[way] = round(by_the_clock_us(step, 30) / 1000, 2)
            table[f"{streams} streams {dtype}"] = figures
    return table


def _step(model: FullModel, streams: int, cache: KeyValueCache) -> None:
    spans = [Span(range(2 * stream, 2 * stream + blocks_of(201)), 200, 1) for stream in range(streams)]
    sequences = CachedSequences(spans, cache, model.rotary, DEVICE)
    ids_T = torch.arange(streams, device=DEVICE)
    to_arrays(model.classifier(model.rows(ids_T, sequences)))


def _copies() -> dict[str, dict[str, float]]:
    """One array to the device, four back, as a gating call has it."""
    table: dict[str, dict[str, float]] = {}
    for rows in (1, 32, 256, 4096):
        x_TD = np.ones((rows, 512), np.float32)
        weights_TK = torch.ones(rows, 2, device=DEVICE)

        def pageable(x_TD: Any = x_TD, weights_TK: Tensor = weights_TK) -> None:
            aligned = torch.empty(x_TD.shape)
            np.copyto(aligned.numpy(), x_TD)
            there = aligned.to(DEVICE)
            for part in (there, there, weights_TK, weights_TK):
                part.cpu().numpy()

        def pinned(x_TD: Any = x_TD, weights_TK: Tensor = weights_TK) -> None:
            there = to_torch(x_TD, DEVICE)
            to_arrays(there, there, weights_TK, weights_TK)

        table[f"{rows} rows of 512"] = {"pageable": by_the_clock_us(pageable), "pinned": by_the_clock_us(pinned)}
    return table


if __name__ == "__main__":
    typer.run(main)
