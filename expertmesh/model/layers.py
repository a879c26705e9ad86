"""Layers that every stage is built of, written with the operations of `invariant`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

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
    """A linear layer whose rows do not depend on their company.

    Once it is packed, its weight is there in no other form; `state_dict` still tells it.
    """

    is_used_as_it_is = False  # whether its weight is used otherwise too and must stay as it is
    _packed_OD: Tensor | None = None
    _rows = slice(None)  # of the packed weight, which are this layer's

    def forward(self, x_ND: Tensor) -> Tensor:
        """[N, in] to [N, out]."""
        if self._packed_OD is None:
            return invariant.linear(x_ND, self.weight, self.bias)
        if self._rows == slice(None):
            return invariant.linear(x_ND, self._packed_OD, self.bias)
        return invariant.linear(x_ND, self.dense_weight(), self.bias)  # a `Joint` has it

    def pack(self) -> None:
        """Puts the weight as products take it."""
        self.packed_elsewhere(invariant.pack(self.weight.detach()), slice(None))

    def packed_elsewhere(self, packed_OD: Tensor, rows: slice) -> None:
        """Says that the weight is some rows of a packed one."""
        self._packed_OD, self._rows = packed_OD, rows
        self.weight = nn.Parameter(torch.empty_like(self.weight, device="meta"), requires_grad=False)

    def dense_weight(self) -> Tensor:
        """The weight [out, in] in the usual form; a copy if it is packed."""
        return self.weight.detach() if self._packed_OD is None else self._packed_OD.to_dense()[self._rows]

    def change_weight(self, weight_OD: Tensor) -> None:
        """Gives it another weight, packed if the old one was."""
        was_packed = self._packed_OD is not None
        self._packed_OD = None
        self.weight = nn.Parameter(weight_OD, requires_grad=False)
        if was_packed:
            self.pack()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight if keep_vars and self._packed_OD is None else self.dense_weight()


class Joint:
    """Linear layers of one input, whose products are one once their weights are packed together.

    Args:
        layers: With as many inputs each, all with a bias or none.
    """

    def __init__(self, *layers: Linear) -> None:
        self._layers = layers
        self._widths = [layer.out_features for layer in layers]
        self._packed_OD: Tensor | None = None
        self._bias_O: Tensor | None = None

    def join(self) -> None:
        """Packs the weights together."""
        if not all(invariant.can_pack(layer.weight) for layer in self._layers):
            return
        self._packed_OD = invariant.pack(torch.cat([layer.weight.detach() for layer in self._layers]))
        if self._layers[0].bias is not None:
            self._bias_O = torch.cat([layer.bias.detach() for layer in self._layers])
        first = 0
        for layer in self._layers:
            layer.packed_elsewhere(self._packed_OD, slice(first, first + layer.out_features))
            first += layer.out_features

    def __call__(self, x_ND: Tensor) -> Sequence[Tensor]:
        """What each layer gives."""
        if self._packed_OD is None:
            return [layer(x_ND) for layer in self._layers]
        return self.split(self.product(x_ND))

    @property
    def is_packed(self) -> bool:
        """Whether it has been joined."""
        return self._packed_OD is not None

    def product(self, x_ND: Tensor) -> Tensor:
        """What the layers give, side by side, once it is packed."""
        assert self._packed_OD is not None
        return invariant.linear(x_ND, self._packed_OD, self._bias_O)

    def split(self, product_NO: Tensor) -> Sequence[Tensor]:
        """What each layer gives, of what all give."""
        return product_NO.split_with_sizes(self._widths, dim=1)


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
        return wide * (wide * wide).mean(-1, keepdim=True).add_(self.eps).rsqrt_() * self.weight


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
        inner_NF = self.inner(*self.gate_and_up(rows_ND))
        if self.training:
            inner_NF = self.dropout(inner_NF)
        return self.down(inner_NF.to(rows_ND.dtype))  # type: ignore[no-any-return]

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
    """Packs the matrices of a stage that only computes from now on."""
    for child in module.modules():
        for joint in vars(child).values():
            if isinstance(joint, Joint):
                joint.join()
    for child in module.modules():
        if isinstance(child, Linear) and not child.is_used_as_it_is and invariant.can_pack(child.weight):
            child.pack()
    return module
