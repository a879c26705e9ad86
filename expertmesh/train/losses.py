"""What training minimises besides being wrong: balanced experts and small router logits."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def load_balancing_loss(logits_TE: Tensor, expert_ids_TK: Tensor) -> Tensor:
    """The auxiliary loss of the Switch Transformer (Fedus et al., 2021, eq. 4-6), for top-k.

    `E * sum_e f_e * P_e`, with f_e the fraction of all T*K dispatched rows that expert e really was given, and P_e
    the router's mean probability of it. f carries no gradient; it says which of the probabilities are to shrink.
    The loss is 1 when the rows are spread evenly, and grows as the same experts get more rows and more probability.

    Args:
        logits_TE: The router's logits.
        expert_ids_TK: The experts each token was sent to.

    Returns:
        A scalar.
    """
    experts = logits_TE.shape[-1]
    counts_E = torch.bincount(expert_ids_TK.reshape(-1), minlength=experts)
    fraction_E = counts_E.to(logits_TE.dtype) / expert_ids_TK.numel()
    probability_E = F.softmax(logits_TE, dim=-1).mean(dim=0)
    return experts * (fraction_E * probability_E).sum()


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """The mean squared log-sum-exp of the router logits (Zoph et al., "ST-MoE", 2022, eq. 5), a scalar."""
    return torch.logsumexp(logits_TE, dim=-1).square().mean()


def smoothed_cross_entropy(logits_BC: Tensor, targets_BC: Tensor, smoothing: float) -> Tensor:
    """Mean cross entropy against `1 - smoothing` of the target and `smoothing` spread over all classes."""
    return F.cross_entropy(logits_BC, targets_BC, label_smoothing=smoothing)


def consistency_loss(first_BC: Tensor, second_BC: Tensor) -> Tensor:
    """The symmetric KL divergence of two passes with different dropout (Wu et al., "R-Drop", 2021), a scalar."""
    first, second = F.log_softmax(first_BC, dim=-1), F.log_softmax(second_BC, dim=-1)
    forth = F.kl_div(first, second, reduction="batchmean", log_target=True)
    back = F.kl_div(second, first, reduction="batchmean", log_target=True)
    return (forth + back) / 2
