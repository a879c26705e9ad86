"""Operations whose rows do not depend on their company.

A row computed alone, in a batch, in another order, at another address or with another thread count must come out
with the same bits; then the mesh equals the full model whatever shares a pass. Which plain torch operations break
this on CPU in fp32 (measured, torch 2.13, AVX-512):

- `F.linear` changes a row when there are 1 to 3 rows, and with two threads also at other counts that are no multiple
  of 8: rows are padded to one. Narrow outputs change when the input is not aligned, which is copied, or its width
  is no multiple of 4, which is padded with zeros.
- `F.silu`, `torch.sigmoid` and tanh-GELU round differently in the vector body and the tail of the flat tensor: they
  are written with `exp` and a division, which do not.
- Attention over padded keys changes with the padded length: it is made a function of the sequence's own length.

Layer norm, softmax, `exp`, top-k and embedding were equal in every case tried and are used as they are.
Models are written with these operations only; tests/test_invariant.py holds them to it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROW_MULTIPLE = 8
COLUMN_MULTIPLE = 4
ALIGNMENT_BYTES = 64


def aligned(x: Tensor) -> Tensor:
    """Gives `x` contiguous and at an address that is a multiple of `ALIGNMENT_BYTES`; copies only if it must."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT_BYTES == 0 else x.clone()


def linear(x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Multiplies rows with a weight matrix: [N, D] and [O, D] give [N, O]."""
    rows, columns = x_ND.shape
    more_rows, more_columns = -rows % ROW_MULTIPLE, -columns % COLUMN_MULTIPLE
    x_ND = F.pad(x_ND, (0, more_columns, 0, more_rows)) if more_rows or more_columns else aligned(x_ND)
    if more_columns:
        weight_OD = F.pad(weight_OD, (0, more_columns))
    return F.linear(x_ND, weight_OD, bias_O)[:rows]


def silu(x: Tensor) -> Tensor:
    """X * sigmoid(x), element by element, the same at every position (Elfwing et al., 2017)."""
    return x / (1.0 + torch.exp(-x))


def bidirectional_attention(q_NHLd: Tensor, k_NHLd: Tensor, v_NHLd: Tensor, lengths_N: Tensor) -> Tensor:
    """Scaled dot-product attention of N sequences that share one padded length L.

    The caller chooses L by a sequence's own length alone, so that a row never depends on its company.

    Args:
        q_NHLd: Queries [N, H, L, d]; rows behind a sequence's length are ignored.
        k_NHLd: Keys, likewise.
        v_NHLd: Values, likewise; their padding must be finite.
        lengths_N: Tokens of each sequence, at least 1.

    Returns:
        [N, H, L, d]; rows behind a sequence's length are meaningless.
    """
    n, heads, length, width = q_NHLd.shape
    flat = (n * heads, length, width)
    scores = torch.bmm(q_NHLd.reshape(flat), k_NHLd.reshape(flat).transpose(1, 2)) * width**-0.5
    behind_NL = torch.arange(length, device=lengths_N.device)[None, :] >= lengths_N[:, None]
    scores = scores.view(n, heads, length, length).masked_fill(behind_NL[:, None, None, :], float("-inf"))
    weights = torch.softmax(scores, dim=-1).view(n * heads, length, length)
    return torch.bmm(weights.to(v_NHLd.dtype), v_NHLd.reshape(flat)).view(n, heads, length, width)
