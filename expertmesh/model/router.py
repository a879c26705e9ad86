"""The router: which experts a row goes to, and with what weights."""

from __future__ import annotations

import torch
from torch import Tensor

from expertmesh.model import invariant
from expertmesh.model.spec import RouterSpec

SIGMOID_SUM_EPS = 1e-20  # as DeepSeek-V3 has it


def route(logits_TE: Tensor, spec: RouterSpec, selection_bias_E: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Chooses the best K experts of each row.

    Args:
        logits_TE: The router's scores in fp32.
        spec: How they are turned into choices and weights.
        selection_bias_E: Added to the scores for choosing only.

    Returns:
        Expert ids [T, K], int64 and ascending along K, and their weights [T, K] in fp32.
    """
    ids_TK, weights_TK = (
        _sparsemixer(logits_TE, spec) if spec.score == "sparsemixer" else _best(logits_TE, spec, selection_bias_E)
    )
    if spec.scale != 1.0:
        weights_TK = weights_TK * spec.scale
    ids_TK, order_TK = torch.sort(ids_TK, dim=-1)
    return ids_TK, torch.gather(weights_TK, 1, order_TK)


def _best(logits_TE: Tensor, spec: RouterSpec, selection_bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    match spec.score:
        case "softmax":
            scores_TE = torch.softmax(logits_TE, dim=-1)
        case "sigmoid":
            scores_TE = invariant.sigmoid(logits_TE)
        case _:
            scores_TE = logits_TE
    selected_by_TE = scores_TE if selection_bias_E is None else scores_TE + selection_bias_E
    if spec.kept_groups < spec.groups:
        selected_by_TE = _within_groups(selected_by_TE, spec)
    ids_TK = torch.topk(selected_by_TE, spec.top_k, dim=-1).indices
    weights_TK = torch.gather(scores_TE, 1, ids_TK)
    if spec.score == "softmax_top":
        return ids_TK, torch.softmax(weights_TK, dim=-1)
    if spec.renormalise:
        total_T1 = weights_TK.sum(dim=-1, keepdim=True)
        weights_TK = weights_TK / (total_T1 + SIGMOID_SUM_EPS if spec.score == "sigmoid" else total_T1)
    return ids_TK, weights_TK


def _within_groups(scores_TE: Tensor, spec: RouterSpec) -> Tensor:
    """Scores with those outside the best groups at minus infinity."""
    scores_TGN = scores_TE.view(len(scores_TE), spec.groups, -1)
    best = 2 if spec.group_score == "top2" else 1
    groups_TG = scores_TGN.topk(best, dim=-1).values.sum(dim=-1)
    kept = torch.topk(groups_TG, spec.kept_groups, dim=-1).indices
    dropped_TG = torch.ones_like(groups_TG, dtype=torch.bool).scatter(1, kept, False)
    return scores_TGN.masked_fill(dropped_TG[:, :, None], float("-inf")).view_as(scores_TE)


def _sparsemixer(logits_TE: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """Two rounds: the best of the experts whose logits are close to the best one's; the second without the first."""
    left_TE = logits_TE
    ids, weights = [], []
    for _ in range(spec.top_k):
        best_T1, id_T1 = left_TE.max(dim=-1, keepdim=True)
        distance_TE = (best_T1 - logits_TE) / torch.maximum(logits_TE.abs(), best_T1)
        close_TE = left_TE.masked_fill(distance_TE > 2 * spec.jitter, float("-inf"))
        ids.append(id_T1)
        weights.append(torch.softmax(close_TE, dim=-1).gather(1, id_T1))
        left_TE = left_TE.scatter(1, id_T1, float("-inf"))
    return torch.cat(ids, dim=1), torch.cat(weights, dim=1)
