"""A model in one process, and the same with every stage in a process of its own behind a bare socket.

A child of `bare`.

python -m benchmarks.bare_model WORK MODEL THREADS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from benchmarks.bare_peers import Array, BareMesh, Layout, peers, stages_of
from benchmarks.child import serve
from benchmarks.layer_case import make_case
from benchmarks.layer_local import own_layer
from benchmarks.models import HEADLINES
from benchmarks.rounds import median_ms_of
from expertmesh.checkpoint.load import StageLoader
from expertmesh.checkpoint.tokenizer import load_classifier_tokenizer
from expertmesh.dispatch import ApplyExperts, Score, classify, combine, drive, layer_loop, plan_dispatch

POSITIONS = range(32, 96)  # of the tokens that `generate` asks for

Pass = Callable[[], Array]
OfSize = Callable[[int], Pass]  # of so many texts, streams or tokens
Ways = tuple[OfSize, OfSize]  # in one process, and bare


def layers(loader: StageLoader, mesh: BareMesh) -> Ways:
    """The experts of one layer with dispatch and combine, of so many tokens."""
    experts = loader.spec.router.experts
    layer = own_layer([loader.expert(0, expert) for expert in range(experts)])

    def own(size: int) -> Pass:
        case = make_case(size)
        given = torch.from_numpy(case.x_TD), torch.from_numpy(case.ids_TK).long(), torch.from_numpy(case.weights_TK)
        return lambda: layer(*given).numpy()

    def bare(size: int) -> Pass:
        case = make_case(size)

        def ask() -> Array:
            plan = plan_dispatch(case.ids_TK, experts)
            applied = mesh.answer(ApplyExperts(0, case.x_TD[plan.row2token], plan.counts_E))
            combined_TD: Array = combine(case.x_TD, applied.rows_ND, case.weights_TK, plan)
            return combined_TD

        return ask

    return own, bare


def texts(loader: StageLoader, mesh: BareMesh) -> Ways:
    """Passes of so many headlines, from their ids on."""
    model = loader.full_model()
    tokenizer = load_classifier_tokenizer(loader.folder, loader.manifest)
    lines = HEADLINES.read_text().splitlines()

    def encoded(size: int) -> list[tuple[Array, Array]]:
        enough = lines * -(-size // len(lines))
        batches = [
            tokenizer.encode(enough[start : start + size], loader.spec.context)
            for start in range(0, len(enough) - size + 1, size)
        ]
        return [(one.ids_T.astype(np.int64), one.lengths_B.astype(np.int64)) for one in batches]

    def own(size: int) -> Pass:
        batches = cycle([tuple(map(torch.from_numpy, batch)) for batch in encoded(size)])
        return lambda: model(*next(batches)).logits_BC.numpy()  # type: ignore[no-any-return]

    def bare(size: int) -> Pass:
        batches = cycle(encoded(size))
        classes = len(loader.spec.head.labels)

        def ask() -> Array:
            scores = drive(classify(loader.spec, *next(batches)), mesh.answer)
            return np.frombuffer(scores.logits_BC, np.float32).reshape(-1, classes)

        return ask

    return own, bare


def streams(loader: StageLoader, mesh: BareMesh) -> Ways:
    """Steps of so many streams, each of one row behind a cache of zeros; greedy."""
    model = loader.full_model()

    def steps(size: int, step: Callable[[Array, Array], Array]) -> Pass:
        ids_B, positions = np.random.default_rng(1).integers(0, loader.spec.embedding.vocab, size), cycle(POSITIONS)
        return lambda: step(ids_B, np.full(size, next(positions), np.int64))

    def own(size: int) -> Pass:
        layout = Layout(loader)

        def step(ids_B: Array, positions_B: Array) -> Array:
            sequences = layout.of(0, torch.from_numpy(positions_B))
            ids: Array = model.classifier(model.rows(torch.from_numpy(ids_B), sequences)).argmax(dim=1).numpy()
            return ids

        return steps(size, step)

    def bare(size: int) -> Pass:
        ones_B = np.ones(size, np.int64)

        def step(ids_B: Array, positions_B: Array) -> Array:
            mesh.positions_B = positions_B
            x_TD = drive(layer_loop(loader.spec, ids_B, ones_B), mesh.answer)
            return np.frombuffer(mesh.answer(Score(x_TD, ones_B)).logits_BC, np.int64)

        return steps(size, step)

    return own, bare


WORKS = {"layer": layers, "classify": texts, "generate": streams}


def main(work: str, folder: str, threads: str) -> None:
    """Answers {"way", "size", "seconds"} with the median milliseconds; `way` is own or bare."""
    with peers(stages_of(Path(folder))) as asked:  # before there are threads
        torch.set_num_threads(int(threads))
        loader = StageLoader(Path(folder), torch.device("cpu"))
        own, bare = WORKS[work](loader, BareMesh(loader.spec, asked))
        ways = {"own": own, "bare": bare}

        def answer(way: str, size: int, seconds: float) -> float:
            with torch.inference_mode():
                if way == "bare":
                    assert np.array_equal(own(size)(), bare(size)()), "they differ in bits"
                return median_ms_of(ways[way](size), seconds)

        serve(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
