"""Operations whose rows do not depend on their company.

A row computed alone, in a batch, in another order, at another address or with another thread count must come out
with the same bits; then the mesh equals the full model whatever shares a pass. Which plain torch operations break
this on CPU in fp32 (measured, torch 2.13, AVX-512):

- `F.linear` adds up in an order that depends on how many rows share the call: below 16 on Intel, below 8 on AMD, and on
  both up to hundreds where a weight is wide. oneDNN's products with weights that it has packed do not, from 2 rows up,
  on any instruction set, number of inputs, outputs or threads that was tried (docs/decisions/0010). They also read a
  weight once, as it lies, where MKL packs it anew at every call. So weights are packed once (`pack`).
- Values in attention lie row by row, and their product depends on a row's place if they have 1, 5 to 7 or 9 to 11
  columns: they are padded to a multiple of 4. Scores of 8 rows are added up otherwise than those of more from 192
  inputs up: there are at least 16 for keys wider than 128. So it is with MKL's AVX-512; where MKL has AVX2 alone, rows
  may depend on their company in attention, which services see when they start (`fingerprint`).
- `F.silu`, `torch.sigmoid` and tanh-GELU round differently in the vector body and the tail of the flat tensor: they
  are written with `exp` and a division, which do not.
- Attention over padded keys changes with the padded length: it is made a function of the sequence's own length.
- The first `exp` of a process is another one if several threads make it: it is made at import (`vector_math`).

Layer norm, softmax, `exp`, `rsqrt`, means and sums over the last dimension, top-k, sort and embedding were equal in
every case tried and are used as they are.

In bfloat16, weights may lie either way. torch computes products of up to `SMALL_PRODUCT` multiplications by another
kernel, which rounds differently: rows are padded until a product is larger than that. Larger ones were equal, padded or
not, but where there is AMX: from `AMX_INNER` inputs up, sums are cut in other places for other numbers of rows, so
every product there has `AMX_ROWS`; and inputs that do not fill a tile of `AMX_COLUMNS` are added up in one of several
ways, so zeros fill it.
On CUDA, products and sums are kernels of our own; see `cuda`.
Models are written with these operations only; tests/test_invariant.py holds them to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from expertmesh.model import cuda, vector_math

ROW_MULTIPLE = 8
WIDE_KEY, WIDE_KEY_ROWS = 129, 16  # from this width on scores have at least so many rows
COLUMN_MULTIPLE = 4
PACKED_FOR_ROWS = 16  # the number of rows that packed weights suit best; they serve every other as well
ALIGNMENT_BYTES = 64
SMALL_PRODUCT = 16**3
AMX_ROWS = 32
AMX_COLUMNS = 32
AMX_INNER = 448
_HAS_AMX = torch.cpu._is_amx_tile_supported()
_HAS_ONEDNN: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
_multiply = torch.ops.mkldnn._linear_pointwise.default if _HAS_ONEDNN else None  # found once: looking it up takes time
vector_math.settle()


def aligned(x: Tensor) -> Tensor:
    """Gives `x` contiguous and at an address that is a multiple of `ALIGNMENT_BYTES`; copies only if it must."""
    x = x.contiguous()
    return x if x.data_ptr() % ALIGNMENT_BYTES == 0 else x.clone()


def can_pack(weight_OD: Tensor) -> bool:
    """Whether products with such a weight are oneDNN's: those in float32 on CPU, where it is there."""
    return _HAS_ONEDNN and weight_OD.dtype == torch.float32 and weight_OD.is_cpu


def pack(weight_OD: Tensor) -> Tensor:
    """The same matrix as oneDNN wants it; it can only be multiplied with, and be unpacked with `to_dense`."""
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight_OD.contiguous(), PACKED_FOR_ROWS)
    return packed


def linear(x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Multiplies rows with a weight matrix, packed or not: [N, D] and [O, D] give [N, O]."""
    if cuda.serves(x_ND):
        return cuda.linear(x_ND, weight_OD, bias_O)
    if weight_OD.is_mkldnn:
        return _packed_linear(x_ND, weight_OD, bias_O)
    if (
        can_pack(weight_OD)
        and x_ND.dtype == torch.float32
        and not (weight_OD.requires_grad and torch.is_grad_enabled())
    ):
        return _packed_linear(x_ND, pack(weight_OD.detach()), bias_O)
    return _linear_by_rows(x_ND, weight_OD, bias_O)


def _packed_linear(x_ND: Tensor, packed_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    rows = x_ND.shape[0]
    more_rows = packed_rows(rows) - rows
    x_ND = torch.constant_pad_nd(x_ND, (0, 0, 0, more_rows)) if more_rows else aligned(x_ND)  # as `F.pad`, at once
    product: Tensor = _multiply(x_ND, packed_OD, bias_O, "none", [], "")  # type: ignore[misc]
    return product[:rows] if more_rows else product


def packed_rows(rows: int) -> int:
    """How many rows oneDNN is given: one alone goes another way, and every number is a kernel to compile and keep."""
    if rows <= 8:
        return 2 if rows <= 2 else 4 if rows <= 4 else 8
    multiple = 8 if rows <= 32 else 16 if rows <= 128 else 64
    return rows + -rows % multiple


def _linear_by_rows(x_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
    rows, columns = x_ND.shape
    in_tiles = _multiplies_in_tiles(x_ND)
    more_columns = -columns % (AMX_COLUMNS if in_tiles else COLUMN_MULTIPLE)
    columns += more_columns
    has_fixed_rows = in_tiles and columns >= AMX_INNER
    if rows > AMX_ROWS and has_fixed_rows:
        return torch.cat([_linear_by_rows(part, weight_OD, bias_O) for part in torch.split(x_ND, AMX_ROWS)])
    more_rows = (AMX_ROWS if has_fixed_rows else _padded_rows(rows, len(weight_OD) * columns, x_ND.dtype)) - rows
    x_ND = F.pad(x_ND, (0, more_columns, 0, more_rows)) if more_rows or more_columns else aligned(x_ND)
    if more_columns:
        weight_OD = F.pad(weight_OD, (0, more_columns))
    elif len(weight_OD) % COLUMN_MULTIPLE:
        weight_OD = weight_OD.contiguous()  # it may be a transpose
    return F.linear(x_ND, weight_OD, bias_O)[:rows]


def _multiplies_in_tiles(x: Tensor) -> bool:
    return x.dtype == torch.bfloat16 and x.is_cpu and _HAS_AMX


def _padded_rows(rows: int, multiplications: int, dtype: torch.dtype) -> int:
    """How many rows are computed in place of `rows`, each of which takes so many multiplications."""
    if dtype == torch.bfloat16 and rows * multiplications <= SMALL_PRODUCT:
        rows = SMALL_PRODUCT // multiplications + 1
    return rows + -rows % ROW_MULTIPLE


def products(x_GND: Tensor, y_GDO: Tensor) -> Tensor:
    """A product for each of G groups: [G, N, D] and [G, D, O] give [G, N, O]."""
    return cuda.products(x_GND, y_GDO) if cuda.serves(x_GND) else torch.bmm(x_GND, y_GDO)


def row_sums(x: Tensor) -> Tensor:
    """Sums over the last dimension."""
    return cuda.row_sums(x) if cuda.serves(x) else x.sum(dim=-1)


def silu(x: Tensor) -> Tensor:
    """X * sigmoid(x), element by element, the same at every position (Elfwing et al., 2017)."""
    if torch.is_grad_enabled():
        return x / (1.0 + torch.exp(-x))
    divisor = torch.neg(x).exp_().add_(1.0)
    return torch.div(x, divisor, out=divisor)


def sigmoid(x: Tensor) -> Tensor:
    """1 / (1 + exp(-x)), element by element, the same at every position."""
    return 1.0 / (1.0 + torch.exp(-x))


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
    scores = products(q_NHLd.reshape(flat), k_NHLd.reshape(flat).transpose(1, 2)).mul_(width**-0.5)
    behind_NL = torch.arange(length, device=lengths_N.device)[None, :] >= lengths_N[:, None]
    scores = scores.view(n, heads, length, length).masked_fill_(behind_NL[:, None, None, :], float("-inf"))
    weights = torch.softmax(scores, dim=-1).view(n * heads, length, length)
    return products(weights.to(v_NHLd.dtype), v_NHLd.reshape(flat)).view(n, heads, length, width)


@dataclass(frozen=True)
class Picked:
    """Blocks of a pool, seen where they are: on CPU nothing is copied to attend to them.

    Attributes:
        pool: All blocks [P, K, S, w].
        numbers: Which of them each of N tiles sees, in their order; some may have fewer than others.
    """

    pool: Tensor
    numbers: Sequence[Sequence[int]]

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Of the blocks if they were copied side by side: [N, B, K, S, w]."""
        heads, size, width = self.pool.shape[1:]
        return len(self.numbers), max(map(len, self.numbers)), heads, size, width


def causal_attention(
    q_NKMd: Tensor,
    k_NBKSd: Tensor | Picked,
    v_NBKSv: Tensor | Picked,
    hidden_NBMS: Tensor,
    scale: float,
    sinks_KM: Tensor | None = None,
) -> Tensor:
    """Scaled dot-product attention over keys in blocks of one fixed size S; not differentiable on CPU.

    Scores are made block by block, their maximum is exact, and what each block gives is added block after block. So a
    row depends neither on how many rows share the call nor on how many blocks there are behind the last that it sees:
    a block that is hidden altogether adds zeros.

    Args:
        q_NKMd: Queries [N, K, M, d] of N tiles and K key heads.
        k_NBKSd: Keys [N, B, K, S, d] of B blocks.
        v_NBKSv: Values [N, B, K, S, v]; those that are hidden must be finite.
        hidden_NBMS: Which keys a query does not see; it must see one.
        scale: Factor on the scores.
        sinks_KM: Logits that take part in the denominator only (Xiao et al., "StreamingLLM", 2023; gpt-oss).

    Returns:
        [N, K, M, v] in float32.
    """
    if not cuda.serves(q_NKMd):
        return _attention_block_by_block(
            q_NKMd.detach(), _picked(k_NBKSd), _picked(v_NBKSv), hidden_NBMS, scale, sinks_KM
        )
    assert isinstance(k_NBKSd, Tensor)
    assert isinstance(v_NBKSv, Tensor)
    n, blocks, heads, size, width = k_NBKSd.shape
    rows = q_NKMd.shape[2]
    q = q_NKMd[:, None].expand(n, blocks, heads, rows, width).reshape(-1, rows, width)
    scores = products(q, k_NBKSd.reshape(-1, size, width).transpose(1, 2)).view(n, blocks, heads, rows, size)
    weights, best_NKM = _weights(scores, hidden_NBMS, scale, sinks_KM)
    flat = weights.to(v_NBKSv.dtype).view(-1, rows, size)
    mixed = products(flat, v_NBKSv.reshape(flat.shape[0], size, -1)).float().view(n, blocks, heads, rows, -1)
    return _merged(mixed, row_sums(weights), best_NKM, sinks_KM)


def _picked(blocks: Tensor | Picked) -> Picked:
    if isinstance(blocks, Picked):
        return blocks
    n, count = blocks.shape[:2]
    return Picked(blocks.detach().flatten(0, 1), [range(tile * count, (tile + 1) * count) for tile in range(n)])


def _attention_block_by_block(
    q_NKMd: Tensor, keys: Picked, values: Picked, hidden_NBMS: Tensor, scale: float, sinks_KM: Tensor | None
) -> Tensor:
    """What `causal_attention` gives, each block multiplied alone and where it is."""
    n, blocks, heads, size, _ = keys.shape
    rows, width, value_width = q_NKMd.shape[2], q_NKMd.shape[3], values.shape[-1]
    in_tiles = _multiplies_in_tiles(q_NKMd)
    more_width = -width % AMX_COLUMNS if in_tiles else 0
    rows_at_once = AMX_ROWS if in_tiles and width + more_width >= AMX_INNER else 0
    more_rows, more_columns = -rows % (rows_at_once or ROW_MULTIPLE), -value_width % COLUMN_MULTIPLE
    if width >= WIDE_KEY:
        more_rows = max(more_rows, WIDE_KEY_ROWS - rows)
    if more_rows or more_width:
        q_NKMd = F.pad(q_NKMd, (0, more_width, 0, more_rows))
    scores = q_NKMd.new_empty(n, blocks, heads, rows + more_rows, size)
    mixed = q_NKMd.new_empty(n, blocks, heads, rows + more_rows, value_width + more_columns)
    for tile, numbers in enumerate(keys.numbers):
        for place, number in enumerate(numbers):
            keys_KSd = keys.pool[number]
            if more_width:
                keys_KSd = F.pad(keys_KSd, (0, more_width))
            _put_scores(q_NKMd[tile], keys_KSd, scores[tile, place], rows_at_once)
    weights, best_NKM = _weights(scores[:, :, :, :rows], hidden_NBMS, scale, sinks_KM)
    is_in_place = weights.dtype == scores.dtype  # then behind the rows is what is finite and never used
    flat = scores if is_in_place else F.pad(weights.to(scores.dtype), (0, 0, 0, more_rows))
    for tile, numbers in enumerate(values.numbers):
        for place, number in enumerate(numbers):
            values_KSv = values.pool[number]
            if more_columns:
                values_KSv = F.pad(values_KSv, (0, more_columns))
            torch.bmm(flat[tile, place], values_KSv, out=mixed[tile, place])
        if len(numbers) < blocks:
            mixed[tile, len(numbers) :] = 0.0
    return _merged(mixed[:, :, :, :rows, :value_width].float(), weights.sum(dim=-1), best_NKM, sinks_KM)


def _put_scores(q_KMd: Tensor, keys_KSd: Tensor, scores_KMS: Tensor, rows_at_once: int) -> None:
    keys_KdS = keys_KSd.transpose(1, 2)
    if not rows_at_once:
        torch.bmm(q_KMd, keys_KdS, out=scores_KMS)
        return
    parts = zip(torch.split(q_KMd, rows_at_once, 1), torch.split(scores_KMS, rows_at_once, 1), strict=True)
    for some_KMd, some_KMS in parts:
        some_KMS.copy_(torch.bmm(some_KMd, keys_KdS))


def _weights(scores_NBKMS: Tensor, hidden_NBMS: Tensor, scale: float, sinks_KM: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights of the keys in float32 but for their total, where float32 scores were; and the best scores."""
    scores = scores_NBKMS.float().mul_(scale).masked_fill_(hidden_NBMS[:, :, None], float("-inf"))
    best_NKM = scores.amax(dim=(1, 4))
    if sinks_KM is not None:
        best_NKM = torch.maximum(best_NKM, sinks_KM)
    return scores.sub_(best_NKM[:, None, :, :, None]).exp_(), best_NKM


def _merged(mixed_NBKMv: Tensor, totals_NBKM: Tensor, best_NKM: Tensor, sinks_KM: Tensor | None) -> Tensor:
    """Adds up what the blocks give, one after another, and divides it by the weights' total."""
    total_NKM, mixed_NKMv = totals_NBKM[:, 0], mixed_NBKMv[:, 0]
    for block in range(1, mixed_NBKMv.shape[1]):
        total_NKM, mixed_NKMv = total_NKM + totals_NBKM[:, block], mixed_NKMv + mixed_NBKMv[:, block]
    if sinks_KM is not None:
        total_NKM = total_NKM + torch.exp(sinks_KM - best_NKM)
    return mixed_NKMv / total_NKM[..., None]
