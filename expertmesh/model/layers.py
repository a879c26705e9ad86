"""Layers that every stage is built of, written with the operations of `invariant`."""

from __future__ import annotations

from collections.abc import Sequence
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

    lies_by_rows = False  # whether its weight is used otherwise too and must stay as it is

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, in] to [N, out]."""
        return invariant.linear(x_ND, self.weight, self.bias)


class Joint:
    """Linear layers of one input, whose products are one once their weights lie side by side.

    They stay layers with weights of their own, which are then views of what lies in memory once.

    Args:
        layers: With as many inputs each, all with a bias or none.
    """

    def __init__(self, *layers: Linear) -> None:
        self._layers = layers
        self._widths = [layer.out_features for layer in layers]
        self._weight_OD: Tensor | None = None
        self._bias_O: Tensor | None = None

    def join(self) -> None:
        """Puts the weights side by side."""
        first = self._layers[0]
        if not invariant.has_columns_first(first.weight):
            return
        self._weight_OD = torch.cat([layer.weight.detach().t() for layer in self._layers], dim=1).t()
        weights = torch.split(self._weight_OD, self._widths)
        if first.bias is not None:
            self._bias_O = torch.cat([layer.bias.detach() for layer in self._layers])
            for layer, bias in zip(self._layers, torch.split(self._bias_O, self._widths), strict=True):
                layer.bias = nn.Parameter(bias, requires_grad=False)
        for layer, weight in zip(self._layers, weights, strict=True):
            layer.weight = nn.Parameter(weight, requires_grad=False)

    def __call__(self, x_ND: Tensor) -> Sequence[Tensor]:
        """What each layer gives."""
        if self._weight_OD is None or self._weight_OD.data_ptr() != self._layers[0].weight.data_ptr():
            return [layer(x_ND) for layer in self._layers]  # they train, or were converted since
        return torch.split(invariant.linear(x_ND, self._weight_OD, self._bias_O), self._widths, dim=1)


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
        self.gate_and_up = Joint(self.gate, self.up)
        self.down = Linear(spec.width, width, bias=spec.bias)
        self.clamped = spec.activation == "swiglu_clamped"
        self.limit, self.alpha = spec.limit, spec.alpha
        self.dropout = nn.Dropout(dropout)

    def forward(self, rows_ND: Tensor) -> Tensor:
        """[N, D] to [N, D] in the rows' dtype, unweighted."""
        rows = len(rows_ND)
        if rows % invariant.ROW_MULTIPLE and invariant.has_columns_first(rows_ND):
            rows_ND = invariant.padded(rows_ND)  # once for both products
        inner_NF = self.inner(*self.gate_and_up(rows_ND))
        if self.training:
            inner_NF = self.dropout(inner_NF)
        out_ND: Tensor = self.down(inner_NF.to(rows_ND.dtype))
        return out_ND if len(out_ND) == rows else out_ND[:rows]

    def inner(self, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        """What lies between the products, in float32."""
        if gate_NF.dtype != torch.float32:
            gate_NF, up_NF = gate_NF.float(), up_NF.float()
        if self.clamped:
            gate_NF, up_NF = gate_NF.clamp(max=self.limit), up_NF.clamp(-self.limit, self.limit)
            return gate_NF * invariant.sigmoid(self.alpha * gate_NF) * (up_NF + 1.0)
        inner_NF = invariant.silu(gate_NF)
        return inner_NF * up_NF if torch.is_grad_enabled() else inner_NF.mul_(up_NF)


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


def arrange(module: ModuleT) -> ModuleT:
    """Puts the matrices of a stage that only computes from now on as products take them without a copy."""
    for child in module.modules():
        for joint in vars(child).values():
            if isinstance(joint, Joint):
                joint.join()
    for child in module.modules():
        if not isinstance(child, Linear) or child.lies_by_rows or child.weight.stride(0) == 1:
            continue
        if invariant.has_columns_first(child.weight):
            child.weight = nn.Parameter(invariant.columns_first(child.weight.detach()), requires_grad=False)
    return module
