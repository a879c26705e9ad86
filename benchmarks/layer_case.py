"""The layer that `layer` measures, and the rows that it is given. Needs nothing but numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

WIDTH, EXPERT_WIDTH, EXPERTS, TOP_K = 512, 2048, 8, 2


@dataclass(frozen=True)
class Case:
    """One call of the layer: x_TD in float32, the experts of each token, ascending, and their weights."""

    x_TD: npt.NDArray[Any]
    ids_TK: npt.NDArray[Any]
    weights_TK: npt.NDArray[Any]


def make_case(tokens: int) -> Case:
    """The same rows and routes in every process."""
    random = np.random.default_rng(tokens)
    x_TD = random.standard_normal((tokens, WIDTH)).astype(np.float32)
    ids_TK = np.stack([np.sort(random.choice(EXPERTS, TOP_K, replace=False)) for _ in range(tokens)]).astype(np.int32)
    first_T = random.uniform(0.5, 0.9, tokens).astype(np.float32)
    return Case(x_TD, ids_TK, np.stack([first_T, 1 - first_T], axis=1))
