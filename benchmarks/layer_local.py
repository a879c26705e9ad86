"""The layer in one process: the project's own, and a plain torch loop over experts. A child of `layer`.

python -m benchmarks.layer_local MODEL THREADS
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.child import serve
from benchmarks.layer_case import EXPERTS, make_case
from benchmarks.rounds import median_ms_of
from expertmesh.checkpoint.load import StageLoader
from expertmesh.dispatch import combine, plan_dispatch
from expertmesh.model.layers import GatedMLP

Layer = Callable[[Tensor, Tensor, Tensor], Tensor]


def own_layer(experts: list[GatedMLP]) -> Layer:
    """Dispatch, experts and combine as the full model has them."""

    def layer(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        plan = plan_dispatch(ids_TK, EXPERTS)
        parts = torch.split(x_TD[plan.row2token], plan.counts_E.tolist())
        rows_ND = torch.cat([experts[expert](part) for expert, part in enumerate(parts) if len(part)]).float()
        combined_TD: Tensor = combine(x_TD, rows_ND, weights_TK, plan)
        return combined_TD

    return layer


def plain_layer(experts: list[GatedMLP]) -> Layer:
    """What one writes in torch without a thought of bits."""
    weights = [(one.gate.dense_weight(), one.up.dense_weight(), one.down.dense_weight()) for one in experts]

    def layer(x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        out_TD = x_TD.clone()
        for expert, (gate, up, down) in enumerate(weights):
            tokens, choices = torch.where(ids_TK == expert)
            if len(tokens):
                rows = x_TD[tokens]
                inner = F.silu(F.linear(rows, gate)) * F.linear(rows, up)
                out_TD.index_add_(0, tokens, F.linear(inner, down) * weights_TK[tokens, choices, None])
        return out_TD

    return layer


def main(model: str, threads: str) -> None:
    """Answers {"layer", "tokens", "seconds"} with the median milliseconds, and {…, "seconds": 0} with the rows."""
    torch.set_num_threads(int(threads))
    loader = StageLoader(Path(model), torch.device("cpu"))
    experts = [loader.expert(0, expert) for expert in range(EXPERTS)]
    layers = {"own": own_layer(experts), "plain": plain_layer(experts)}

    def answer(layer: str, tokens: int, seconds: float) -> Any:
        case = make_case(tokens)
        x_TD, weights_TK = torch.from_numpy(case.x_TD), torch.from_numpy(case.weights_TK)
        ids_TK = torch.from_numpy(case.ids_TK).long()
        with torch.inference_mode():
            if not seconds:
                return layers[layer](x_TD, ids_TK, weights_TK).tolist()
            return median_ms_of(lambda: layers[layer](x_TD, ids_TK, weights_TK), seconds)

    serve(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
