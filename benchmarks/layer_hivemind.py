"""The same experts in a hivemind server, for `layer`. It needs an environment of its own.

    python3 -m venv ENV && ENV/bin/pip install torch==2.13.0 'setuptools<81' 'numpy<2' hivemind==1.1.12
    python -m benchmarks.layer --hivemind-python ENV/bin/python

One server with 8 experts, called in two ways: by hivemind's own mixture of experts, which sends every (token, expert)
pair by itself, and by one `RemoteExpert` call for each expert with all of its rows, the best that its parts allow.
The former routes by itself, over a grid of 8, two experts a token.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import hivemind
import torch
import torch.nn.functional as F
from hivemind.moe.server.layers import register_expert_class
from torch import Tensor, nn

from benchmarks.child import serve
from benchmarks.layer_case import EXPERT_WIDTH, EXPERTS, TOP_K, WIDTH, Case, make_case
from benchmarks.rounds import median_ms_of

PREFIX = "expert."
MIXTURE, BATCHED = "hivemind, its mixture of experts", "hivemind, a call for each expert"


@register_expert_class("gated_mlp", lambda rows, width: torch.empty(rows, width))
class GatedMLP(nn.Module):
    """A gated MLP with random weights."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(width, EXPERT_WIDTH, bias=False) for _ in range(2))
        self.down = nn.Linear(EXPERT_WIDTH, width, bias=False)

    def forward(self, rows_ND: Tensor) -> Tensor:
        """[N, D] to [N, D]."""
        inner: Tensor = self.down(F.silu(self.gate(rows_ND)) * self.up(rows_ND))
        return inner


def batched(experts: list[Any], pool: ThreadPoolExecutor, case: Case) -> Tensor:
    """Dispatch, one call for each expert that has rows, combine."""
    x_TD, weights_TK = torch.from_numpy(case.x_TD), torch.from_numpy(case.weights_TK)
    places = [torch.where(torch.from_numpy(case.ids_TK) == expert) for expert in range(EXPERTS)]
    used = [(expert, tokens, choices) for expert, (tokens, choices) in zip(experts, places, strict=True) if len(tokens)]
    replies = pool.map(lambda one: _inferred(one[0], x_TD[one[1]]), used)
    out_TD = x_TD.clone()
    for rows_ND, (_, tokens, choices) in zip(replies, used, strict=True):
        out_TD.index_add_(0, tokens, rows_ND * weights_TK[tokens, choices, None])
    return out_TD


def _inferred(expert: Any, rows_ND: Tensor) -> Tensor:
    with torch.inference_mode():
        given: Tensor = expert(rows_ND)
        return given


def serve_experts() -> None:
    """Serves the experts until stdin ends; tells its addresses in one line of stdout."""
    server = hivemind.moe.Server.create(
        expert_pattern=f"{PREFIX}[0:{EXPERTS}]",
        num_experts=EXPERTS,
        expert_cls="gated_mlp",
        hidden_dim=WIDTH,
        max_batch_size=512,
        optim_cls=None,
        num_handlers=EXPERTS,
        start=True,
    )
    print(" ".join(map(str, server.dht.get_visible_maddrs())), flush=True)
    sys.stdin.read()
    server.shutdown()


def ask_experts(addresses: list[str]) -> None:
    """Answers {"ways": true} with what there is to measure, and {"way", "tokens", "seconds"} with milliseconds."""
    dht = hivemind.DHT(start=True, initial_peers=addresses, client_mode=True)
    experts = hivemind.moe.get_experts(dht, [f"{PREFIX}{expert}" for expert in range(EXPERTS)])
    while not all(experts):  # until the server has declared them
        time.sleep(0.2)
        experts = hivemind.moe.get_experts(dht, [f"{PREFIX}{expert}" for expert in range(EXPERTS)])
    mixture = hivemind.moe.RemoteMixtureOfExperts(
        in_features=WIDTH, grid_size=(EXPERTS,), dht=dht, uid_prefix=PREFIX, k_best=TOP_K
    )
    pool = ThreadPoolExecutor(EXPERTS)

    def call_of(way: str, case: Case) -> Callable[[], Any]:
        if way == BATCHED:
            return lambda: batched(experts, pool, case)
        return lambda: _inferred(mixture, torch.from_numpy(case.x_TD))

    def answer(ways: bool = False, way: str = MIXTURE, tokens: int = 0, seconds: float = 0.0) -> Any:
        return [MIXTURE, BATCHED] if ways else median_ms_of(call_of(way, make_case(tokens)), seconds)

    serve(answer)
    dht.shutdown()


def main() -> None:
    """Serves if it is told so; else starts a process that does, since hivemind's peers do not call themselves."""
    if sys.argv[1:] == ["serve"]:
        serve_experts()
        return
    command = [sys.executable, "-m", "benchmarks.layer_hivemind", "serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        ask_experts(server.stdout.readline().split())
        server.stdin.close()


if __name__ == "__main__":
    main()
