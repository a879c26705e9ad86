"""The same experts as Ray Serve deployments, for `layer`. It needs an environment of its own.

    python3 -m venv ENV && ENV/bin/pip install torch==2.13.0 'ray[serve]'
    python -m benchmarks.layer --ray-python ENV/bin/python

8 deployments of one replica with one thread each; an asyncio driver calls their handles with numpy arrays, all at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
from typing import Any

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

import numpy as np
import ray
from ray import serve

from benchmarks.child import serve as answer_questions
from benchmarks.layer_case import EXPERT_WIDTH, EXPERTS, WIDTH, Case, make_case
from benchmarks.rounds import median_ms

WAY = "Ray Serve"


class Expert:
    """A gated MLP with random weights."""

    def __init__(self, seed: int) -> None:
        import torch

        torch.manual_seed(seed)
        torch.set_num_threads(1)
        self.gate, self.up = torch.randn(EXPERT_WIDTH, WIDTH), torch.randn(EXPERT_WIDTH, WIDTH)
        self.down = torch.randn(WIDTH, EXPERT_WIDTH)

    def __call__(self, rows_ND: Any) -> Any:
        """[N, D] to [N, D]."""
        import torch
        import torch.nn.functional as F

        with torch.inference_mode():
            rows = torch.from_numpy(np.array(rows_ND))
            return F.linear(F.silu(F.linear(rows, self.gate)) * F.linear(rows, self.up), self.down).numpy()


async def layer(handles: list[Any], case: Case) -> Any:
    """Dispatch, experts, combine."""
    places = [np.nonzero(case.ids_TK == expert) for expert in range(EXPERTS)]
    used = [(handle, tokens, choices) for handle, (tokens, choices) in zip(handles, places, strict=True) if len(tokens)]
    replies = await asyncio.gather(*(handle.remote(case.x_TD[tokens]) for handle, tokens, _ in used))
    out_TD = case.x_TD.copy()
    for rows_ND, (_, tokens, choices) in zip(replies, used, strict=True):
        out_TD[tokens] += rows_ND * case.weights_TK[tokens, choices, None]  # a token is in an expert's rows once
    return out_TD


def main() -> None:
    """Answers {"ways": true} with what there is to measure, and {"way", "tokens", "seconds"} with milliseconds."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    actors = {"num_cpus": 0, "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}}}
    deployment = serve.deployment(ray_actor_options=actors)(Expert)
    handles = [
        serve.run(deployment.options(name=f"expert-{expert}").bind(expert), name=f"app-{expert}", route_prefix=None)
        for expert in range(EXPERTS)
    ]
    loop = asyncio.new_event_loop()

    def answer(ways: bool = False, way: str = WAY, tokens: int = 0, seconds: float = 0.0) -> Any:
        if ways:
            return [WAY]
        case = make_case(tokens)
        return loop.run_until_complete(median_ms(lambda: layer(handles, case), seconds))

    try:
        answer_questions(answer)
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
