"""The KV cache: keys and values of the tokens before, in blocks.

A block holds `BLOCK_TOKENS` tokens of one sequence in every layer, which is also the size in which attention goes over
keys; so a sequence may be computed whole, in chunks or token by token, here or elsewhere, and gives the same bits. How
attention goes over them is told by `cached_sequences`; who may have how many blocks is decided by `serving.leases`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from expertmesh.model.invariant import Picked
from expertmesh.model.layers import DTYPES
from expertmesh.model.spec import ModelSpec

BLOCK_TOKENS = 128


def blocks_of(tokens: int) -> int:
    """Blocks that a sequence of so many tokens needs."""
    return -(-tokens // BLOCK_TOKENS)


class KeyValueCache:
    """Keys and values of every layer.

    Args:
        spec: The model.
        blocks: How many blocks there are.
        device: Where they are.
    """

    block_tokens = BLOCK_TOKENS

    def __init__(self, spec: ModelSpec, blocks: int, device: torch.device) -> None:
        heads, key_width, value_width = _shape(spec)
        self.blocks = blocks
        spare = device.type == "cuda"  # one more, behind the others, for rows that only pad a step
        self.dtype = DTYPES[spec.dtype]
        self._is_latent = spec.attention.kind == "latent"
        self._value_width = value_width

        def pool(width: int) -> Tensor:  # zeros, since even what is hidden must be finite
            return torch.zeros(blocks + spare, heads, BLOCK_TOKENS, width, dtype=self.dtype, device=device)

        self._keys = [pool(key_width) for _ in range(spec.layers)]
        self._values = [] if self._is_latent else [pool(value_width) for _ in range(spec.layers)]
        self._stale: list[set[int]] = [set() for _ in range(spec.layers)]

    @staticmethod
    def block_bytes(spec: ModelSpec) -> int:
        """Memory of one block, in all layers."""
        heads, key_width, value_width = _shape(spec)
        width = key_width if spec.attention.kind == "latent" else key_width + value_width
        return spec.layers * heads * BLOCK_TOKENS * width * DTYPES[spec.dtype].itemsize

    def renew(self, blocks: Iterable[int]) -> None:
        """Says that blocks go to another sequence, which must never meet numbers that are not finite in them.

        They are emptied, layer by layer, when something is first written into them: at once it would take too long.
        """
        for stale in self._stale:
            stale.update(blocks)

    def places(self, block_T: Tensor, slot_T: Tensor) -> Tensor:
        """Where `write` puts rows: place_R of all their heads, row by row."""
        heads_K = torch.arange(self._keys[0].shape[1], device=block_T.device)
        head_TK = block_T[:, None] * len(heads_K) + heads_K
        return (head_TK * BLOCK_TOKENS + slot_T[:, None]).flatten()

    def write(self, layer: int, place_R: Tensor, k_TKd: Tensor, v_TKv: Tensor) -> None:
        """Puts the rows of a step in their places; the same rows may be put there again."""
        if self._stale[layer]:
            self.prepare(layer, (place_R // (self._keys[layer].shape[1] * BLOCK_TOKENS)).tolist())
        _put(self._keys[layer], place_R, k_TKd)
        if not self._is_latent:
            _put(self._values[layer], place_R, v_TKv)

    def prepare(self, layer: int, blocks: Iterable[int]) -> None:
        """Empties those blocks that are to be emptied before something is put into them."""
        if self._stale[layer]:
            self._empty(layer, self._stale[layer].intersection(blocks))

    def put(self, layer: int, block_T: Tensor, slot_T: Tensor, k_TKd: Tensor, v_TKv: Tensor) -> None:
        """Puts rows in their places, in blocks that are prepared; nothing else is needed for it on the host."""
        self._keys[layer][block_T, :, slot_T] = k_TKd.to(self._keys[layer].dtype)
        if not self._is_latent:
            self._values[layer][block_T, :, slot_T] = v_TKv.to(self._values[layer].dtype)

    def _empty(self, layer: int, blocks: set[int]) -> None:
        for pool in (self._keys[layer], *self._values[layer : layer + 1]):
            for block in blocks:
                pool[block].zero_()
        self._stale[layer] -= blocks

    def read(self, layer: int, blocks_NB: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [N, B, K, S, d] and values [N, B, K, S, v] of blocks, copied."""
        keys = _copied(self._keys[layer], blocks_NB)
        return keys, keys[..., : self._value_width] if self._is_latent else _copied(self._values[layer], blocks_NB)

    def view(self, layer: int, blocks: Sequence[Sequence[int]]) -> tuple[Picked, Picked]:
        """Keys and values of the blocks of some tiles, where they are."""
        keys = self._keys[layer]
        values = keys[..., : self._value_width] if self._is_latent else self._values[layer]
        return Picked(keys, blocks), Picked(values, blocks)


def _put(pool: Tensor, place_R: Tensor, x_TKw: Tensor) -> None:
    width = pool.shape[-1]
    pool.view(-1, width).index_copy_(0, place_R, x_TKw.detach().to(pool.dtype).reshape(-1, width))


def _copied(pool: Tensor, blocks_NB: Tensor) -> Tensor:
    """Blocks of a pool, copied whole; indexing would copy element by element."""
    return pool.index_select(0, blocks_NB.flatten()).view(*blocks_NB.shape, *pool.shape[1:])


def _shape(spec: ModelSpec) -> tuple[int, int, int]:
    """Key heads, and the widths of a key and a value."""
    attention = spec.attention
    if attention.kind == "latent":
        return 1, attention.latent_rank + 2 * len(spec.rotary.frequencies), attention.latent_rank
    return attention.kv_heads, attention.head_width, attention.head_width
