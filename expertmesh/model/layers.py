"""Layers that every stage is built of, written with the operations of `invariant`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from expertmesh.model import cuda, invariant
from expertmesh.model.spec import ExpertSpec, NormSpec

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Dropout:
    """Training-time dropout rates; all zero when serving."""

    embedding: float = 0.0
    attention: float = 0.0
    expert: float = 0.0
    head: float = 0.0


NO_DROPOUT = Dropout()


class Linear(nn.Linear):
    """A linear layer whose rows do not depend on their company."""

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, in] to [N, out]."""
        return invariant.linear(x_ND, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Root mean square norm (Zhang and Sennrich, 2019), in float32 whatever it is given.

    Args:
        width: Elements of a row.
        eps: Added to the mean square.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same in float32."""
        if cuda.serves(x):
            return cuda.rms_norm(x, self.weight, self.eps)
        wide = x.float()
        return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class LayerNorm(nn.LayerNorm):
    """Layer norm in float32 whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] to the same in float32."""
        return super().forward(x.float())


def norm(width: int, spec: NormSpec) -> nn.Module:
    """The norm that a spec asks for."""
    return RMSNorm(width, spec.eps) if spec.kind == "rms" else LayerNorm(width, eps=spec.eps)


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)): an expert, a shared expert or a dense layer's MLP; a pure function of rows.

    Args:
        width: Model width D.
        spec: Inner width and activation.
        dropout: Of the inner rows.
    """

    def __init__(self, width: int, spec: ExpertSpec, dropout: float = 0.0) -> None:
        super().__init__()
        self.gate = Linear(width, spec.width, bias=spec.bias)
        self.up = Linear(width, spec.width, bias=spec.bias)
        self.down = Linear(spec.width, width, bias=spec.bias)
        self.clamped = spec.activation == "swiglu_clamped"
        self.limit, self.alpha = spec.limit, spec.alpha
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows_ND: Tensor) -> Tensor:
        """[N, D] to [N, D] in the rows' dtype, unweighted."""
        inner_NF = self.inner(self.gate(rows_ND), self.up(rows_ND))
        return self.down(self.dropout(inner_NF).to(rows_ND.dtype))  # type: ignore[no-any-return]

    def inner(self, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        """What lies between the products, in float32."""
        gate_NF, up_NF = gate_NF.float(), up_NF.float()
        if self.clamped:
            gate_NF, up_NF = gate_NF.clamp(max=self.limit), up_NF.clamp(-self.limit, self.limit)
            return gate_NF * invariant.sigmoid(self.alpha * gate_NF) * (up_NF + 1.0)
        return invariant.silu(gate_NF) * up_NF


def table(rows: int, width: int) -> nn.Embedding:
    """An embedding; on the meta device without random numbers, for which torch would import its compiler."""
    weight = torch.empty(rows, width)
    if not weight.is_meta:
        nn.init.normal_(weight)
    return nn.Embedding(rows, width, _weight=weight)


def narrow(module: ModuleT, dtype: torch.dtype) -> ModuleT:
    """Converts a stage's or model's matrices to a dtype; norms, routers and what is added to scores stay in float32."""
    for name, child in module.named_modules():
        if isinstance(child, Linear | nn.Embedding) and name.rpartition(".")[2] != "router":
            child.to(dtype)
    return module
