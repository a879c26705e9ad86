"""What this process computes, as a hash of bits.

A numeric profile is processor features, build and settings together. It is not assumed from their names but seen: a
fixed set of small operations at the model's widths is run and its bits are hashed. Two processes with one fingerprint
give the same answers; the gateway mixes only those, or says that an answer is not exact.

Every service does this at start, so it is kept quick: what a product adds up over is as wide as in the model, and it
has fewer rows and columns where those are many.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from expertmesh.model import invariant
from expertmesh.model.cuda import has_kernels
from expertmesh.model.layers import DTYPES, RMSNorm
from expertmesh.model.router import route
from expertmesh.model.spec import ModelSpec

ROWS = 16
COMPANIES = (1, 3, 8, 17, 64)  # rows that share a product
ATTENDED_ROWS = 72
MANY_ROWS = 1024
KEY_BLOCKS = (1, 3)
KEYS = 128
MOST_COLUMNS = 512
MOST_WORDS = 4096  # columns of a language model's head
MOST_HEADS = 2
MOST_PRODUCTS = 2**28  # multiplications of the product with many rows
HEX_DIGITS = 16
_NAMES = {"float32": "fp32", "bfloat16": "bf16"}
_PERIOD = 2039


@dataclass(frozen=True)
class Profile:
    """How a process computes.

    Attributes:
        fingerprint: Hash of the bits, in hex.
        name: Readable: device, dtype, instruction set, torch version, fingerprint.
    """

    fingerprint: str
    name: str


@torch.inference_mode()
def take_profile(spec: ModelSpec, device: torch.device) -> Profile:
    """Runs the operations of every stage at the spec's widths and hashes what they give."""
    digest = hashlib.sha256()
    operations = _Operations(spec, device)
    for result in operations.results():
        digest.update(result.float().contiguous().cpu().numpy().tobytes())
    fingerprint = digest.hexdigest()[:HEX_DIGITS]
    features = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.cuda.get_device_name(device)
    kind = device.type if device.type == "cpu" or has_kernels() else f"plain-{device.type}"
    if not operations.rows_keep_their_bits():
        kind = f"uneven-{kind}"
    name = f"{kind}-{_NAMES[spec.dtype]} {features} torch-{torch.__version__} {fingerprint}"
    return Profile(fingerprint, name)


class _Operations:
    """The operations of a model's stages, on numbers that depend on no generator."""

    def __init__(self, spec: ModelSpec, device: torch.device) -> None:
        self.spec = spec
        self.dtype = DTYPES[spec.dtype]
        # in [-1, 1], of full mantissas: products of short ones add up without rounding, and then no order can be told
        self._numbers = ((torch.arange(_PERIOD, device=device) * 7919 % _PERIOD - 1019) / 1021.0).repeat(2)

    def rows_keep_their_bits(self) -> bool:
        """Whether rows of the stages' products are the same in any company; on an unknown processor they may not be."""
        for inputs, outputs in self._products():
            weight = self._take(min(outputs, MOST_COLUMNS), inputs).to(self.dtype)
            x = self._take(max(COMPANIES), inputs).to(self.dtype)
            together = invariant.linear(x, weight)
            if not all(torch.equal(invariant.linear(x[:rows], weight), together[:rows]) for rows in COMPANIES):
                return False
        return not self.spec.attention.is_causal or self._attended_rows_keep_their_bits()

    def _attended_rows_keep_their_bits(self) -> bool:
        """The same of causal attention, where rows of all heads that share a key are multiplied together."""
        _, width, value_width = self._attended()
        keys, queries = self._matrix(1, 1, 1, KEYS, width), self._matrix(1, 1, ATTENDED_ROWS, width).flip(2)
        hidden = torch.zeros(1, 1, ATTENDED_ROWS, KEYS, dtype=torch.bool, device=keys.device)

        def attend(rows: slice) -> Tensor:
            values = keys[..., :value_width]
            return invariant.causal_attention(queries[:, :, rows], keys, values, hidden[:, :, rows], width**-0.5)

        together = attend(slice(ATTENDED_ROWS))
        some = [rows for count in COMPANIES for rows in (slice(count), slice(ATTENDED_ROWS - count, ATTENDED_ROWS))]
        return all(torch.equal(attend(rows), together[:, :, rows]) for rows in some)

    def results(self) -> Iterator[Tensor]:
        """What each operation gives."""
        spec = self.spec
        for inputs, outputs in self._products():
            yield self._product(ROWS, inputs, outputs)
        columns = max(8, MOST_PRODUCTS // (MANY_ROWS * spec.width))
        yield self._product(MANY_ROWS, spec.width, min(spec.expert.width, columns))
        yield from self._between_products()
        yield from self._routing()
        if not spec.attention.is_causal:
            yield from self._bidirectional()
        elif spec.attention.kind == "latent":
            yield from self._latent()
        else:
            yield from self._grouped()
        if spec.generates:
            yield self._product(ROWS, spec.width, min(spec.embedding.vocab, MOST_WORDS), MOST_WORDS)

    def _products(self) -> Iterator[tuple[int, int]]:
        """Inputs and outputs of the stages' matrices; those of the kinds of attention and of heads are elsewhere."""
        spec, width = self.spec, self.spec.width
        yield width, spec.expert.width
        yield spec.expert.width, width
        if spec.embedding.bigram_buckets:
            yield spec.embedding.bigram_width, width
        for inner in (spec.dense.width, spec.dense.shared_width):
            if inner:
                yield width, inner
                yield inner, width
        if spec.dense.shared_gate:
            yield width, 1

    def _between_products(self) -> Iterator[Tensor]:
        spec = self.spec
        rows = self._take(ROWS, spec.width)
        yield self._rms(rows) if spec.norm.kind == "rms" else F.layer_norm(rows, (spec.width,), eps=spec.norm.eps)
        yield invariant.silu(rows * 8)
        yield invariant.sigmoid(rows * 8)
        yield torch.exp(rows * 8)
        yield rows.mean(dim=0)

    def _routing(self) -> Iterator[Tensor]:
        spec = self.spec
        logits = invariant.linear(self._take(ROWS, spec.width), self._take(spec.router.experts, spec.width)) * 0.1
        yield logits
        yield torch.softmax(logits, dim=-1)
        ids, weights = route(logits, spec.router, self._take(1, spec.router.experts)[0] * 0.01)
        yield from (ids, weights)

    def _bidirectional(self) -> Iterator[Tensor]:
        spec, heads = self.spec, self.spec.attention.heads
        pooled_width = spec.width * (2 if spec.head.pool == "mean_max" else 1)
        for inputs, outputs in (
            (spec.width, 3 * spec.width),
            (spec.width, spec.width),
            (pooled_width, len(spec.head.labels)),
        ):
            yield self._product(ROWS, inputs, outputs)
        for length in (ROWS, 8 * ROWS):
            q = self._take(1, heads, length, spec.width // heads)
            lengths = torch.tensor([length - 3], device=q.device)
            yield invariant.bidirectional_attention(q, q.flip(2), q * 0.5, lengths)

    def _grouped(self) -> Iterator[Tensor]:
        spec, attention = self.spec, self.spec.attention
        width = attention.heads * attention.head_width
        key_width = attention.kv_heads * attention.head_width
        for inputs, outputs in ((spec.width, width), (spec.width, key_width), (width, spec.width)):
            yield self._product(ROWS, inputs, outputs)
        if attention.qk_norm != "none":
            yield self._rms(self._take(ROWS, width if attention.qk_norm == "flat" else attention.head_width))
        yield from self._causal()

    def _latent(self) -> Iterator[Tensor]:
        spec, attention = self.spec, self.spec.attention
        rank, turned = attention.latent_rank, 2 * len(spec.rotary.frequencies)
        width = attention.heads * (attention.head_width + turned)
        if attention.query_rank:
            yield self._product(ROWS, spec.width, attention.query_rank)
            yield self._rms(self._take(ROWS, attention.query_rank))
        yield self._product(ROWS, attention.query_rank or spec.width, width)
        yield self._product(ROWS, spec.width, rank + turned)
        yield self._rms(self._take(ROWS, rank + turned)[:, :rank])
        yield invariant.linear(self._matrix(ROWS, attention.head_width), self._matrix(attention.head_width, rank).T)
        yield self._product(ROWS, rank, attention.value_width)
        yield self._product(ROWS, attention.heads * attention.value_width, spec.width)
        yield from self._causal()

    def _attended(self) -> tuple[int, int, int]:
        """Key heads, and widths of a key and a value, as causal attention multiplies them."""
        attention = self.spec.attention
        if attention.kind == "latent":
            return 1, attention.latent_rank + 2 * len(self.spec.rotary.frequencies), attention.latent_rank
        return min(attention.kv_heads, MOST_HEADS), attention.head_width, attention.head_width

    def _causal(self) -> Iterator[Tensor]:
        heads, width, value_width = self._attended()
        scale = self.spec.attention.scale or width**-0.5
        for blocks in KEY_BLOCKS:
            keys = self._matrix(1, blocks, heads, KEYS, width)
            for rows in (invariant.ROW_MULTIPLE, KEYS):
                positions = torch.arange(rows, device=keys.device) + (blocks - 1) * KEYS
                places = torch.arange(blocks * KEYS, device=keys.device).view(1, blocks, 1, KEYS)
                hidden = places > positions[:, None]
                queries = self._matrix(1, heads, rows, width).flip(2) * 8
                yield invariant.causal_attention(queries, keys, keys[..., :value_width], hidden, scale)

    def _rms(self, rows: Tensor) -> Tensor:
        norm = RMSNorm(rows.shape[-1], self.spec.norm.eps).to(rows.device)
        result: Tensor = norm(rows)
        return result

    def _product(self, rows: int, inputs: int, outputs: int, most: int = MOST_COLUMNS) -> Tensor:
        return invariant.linear(self._matrix(rows, inputs), self._matrix(min(outputs, most), inputs))

    def _matrix(self, *shape: int) -> Tensor:
        return self._take(*shape).to(self.dtype)

    def _take(self, *shape: int) -> Tensor:
        """Numbers in float32: the same ones for the same shape, and hardly two rows alike."""
        *rows, columns = shape
        starts = torch.arange(torch.Size(rows).numel(), device=self._numbers.device) * 1013 % _PERIOD
        wide = self._numbers.repeat(columns // _PERIOD + 1)
        return wide.unfold(0, columns, 1)[starts].view(shape)
