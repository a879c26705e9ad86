"""Start values, learning-rate schedule, parameter groups and averaged weights."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from expertmesh.model.full import FullModel
from expertmesh.train.settings import TrainSettings


def initialise(model: FullModel, settings: TrainSettings) -> None:
    """Draws small embeddings; bigrams and positions start near zero and so only say what they have learnt.

    In a language model, which is deeper, what layers add to the residual stream starts smaller the more there are
    (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019).
    """
    embedding = model.spec.embedding
    nn.init.normal_(model.embedding.token.weight, std=settings.embedding_std)
    if embedding.learned_positions:
        nn.init.normal_(model.embedding.position.weight, std=settings.bigram_std)
    if embedding.bigram_buckets:
        nn.init.normal_(model.embedding.bigram.weight, std=settings.bigram_std)
    if model.spec.generates:
        for name, parameter in model.named_parameters():
            if name.startswith(("gating.", "experts.")) and name.endswith(("out.weight", "down.weight")):
                parameter.data.mul_((2 * model.spec.layers) ** -0.5)


def make_optimizer(model: FullModel, settings: TrainSettings) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter, 2019) with weight decay by kind of tensor; see `TrainSettings`."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name.startswith("embedding.") and name.endswith(("token.weight", "bigram.weight", "position.weight")):
            kind = (settings.embedding_weight_decay, settings.embedding_rate)
        else:
            kind = (settings.weight_decay if parameter.ndim > 1 else 0.0, 1.0)
        groups.setdefault(kind, []).append(parameter)
    return torch.optim.AdamW(
        [{"params": parameters, "weight_decay": decay, "rate": rate} for (decay, rate), parameters in groups.items()],
        lr=settings.learning_rate,
        betas=(0.9, 0.98),
        fused=True,
    )


def rate_at(step: int, steps: int, settings: TrainSettings, decay_steps: int = 0) -> float:
    """The learning rate of step `step` of `steps`, counted from 0: linear warm-up, then a cosine.

    With `decay_steps` it stays at its peak and falls along a line in the last `decay_steps`, so that until then
    nobody needs to know how long the run will be (Haegele et al., "Scaling Laws and Compute-Optimal Training Beyond
    Fixed Training Durations", 2024).
    """
    warmup = min(settings.warmup_steps, steps // 2)
    if step < warmup:
        return settings.learning_rate * (step + 1) / warmup
    if decay_steps:
        left = min((steps - step) / decay_steps, 1.0)
    else:
        left = (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2
    return settings.learning_rate * (settings.final_rate + (1 - settings.final_rate) * left)


class AveragedWeights:
    """An exponential moving average of a model's weights.

    Args:
        model: Its weights are the first value.
        decay: Weight of the past in each step; early steps use less, so that the start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: weight.detach().clone() for name, weight in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after step `step`, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        names: dict[str, Tensor] = dict(model.named_parameters())
        torch._foreach_lerp_([self.weights[name] for name in names], list(names.values()), 1 - decay)
