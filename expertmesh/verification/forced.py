"""A reference's sequences and the tokens it generated behind them, in one pass through the layers.

What is generated greedily is generated again exactly when each token is the likeliest behind the ones before it. So one
pass over ids and tokens together tells of both, where a model is too large for generating token by token.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from expertmesh.dispatch import Gate, Score, StageCall
from expertmesh.serving.inspection import to_host
from expertmesh.verification.agreement import Computed
from expertmesh.verification.reference import Array, Reference, Route


class ForcedPass:
    """Takes down what a pass over `sequences`, one after another, gives.

    Args:
        reference: The reference.

    Attributes:
        sequences: What has to go through the layers.
    """

    def __init__(self, reference: Reference) -> None:
        self._rows, self._length = reference.ids_BT.shape
        self.sequences = np.hstack([reference.ids_BT, reference.generated_BG])[:, :-1].tolist()
        self._hidden: list[Array] = []
        self._routes: list[Route] = []
        self._logits_BTV: Array = np.empty(0)

    def observe(self, call: StageCall, result: Any) -> None:
        """Takes down one stage call and its result."""
        match call:
            case Gate(x_TD=x_TD):
                self._hidden.append(self._of_ids(x_TD))
                if result.expert_ids_TK is not None:
                    experts_BTK, weights_BTK = self._of_ids(result.expert_ids_TK), self._of_ids(result.weights_TK)
                    top_k = experts_BTK.shape[2]
                    self._routes.append(Route(experts_BTK.reshape(-1, top_k), weights_BTK.reshape(-1, top_k)))
            case Score():
                self._logits_BTV = self._by_sequence(result.logits_BC)

    @property
    def computed(self) -> Computed:
        """What was taken down, when the pass is over."""
        likeliest_BG = self._logits_BTV[:, self._length - 1 :].argmax(axis=2)
        return Computed(self._logits_BTV[:, : self._length], self._hidden, self._routes, likeliest_BG)

    def _by_sequence(self, rows: Any) -> Array:
        on_host: Array = to_host(rows)
        return on_host.reshape(self._rows, -1, *on_host.shape[1:])

    def _of_ids(self, rows: Any) -> Array:
        """Those of the reference's ids, without the tokens behind them; copied, for rows may change later."""
        return self._by_sequence(rows)[:, : self._length].copy()
