"""What this process computes, as a hash of bits.

A numeric profile is processor features, build and settings together. It is not assumed from their names but seen: a
fixed set of small operations at the model's widths is run and its bits are hashed. Two processes with one fingerprint
give the same answers; the gateway mixes only those, or says that an answer is not exact.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from expertmesh.model import invariant
from expertmesh.model.spec import ModelSpec

ROWS = 16
MANY_ROWS = 1024
HEX_DIGITS = 16


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
    width, expert_width, heads = spec.width, spec.expert.width, spec.attention.heads
    pooled_width = width * (2 if spec.head.pool == "mean_max" else 1)
    shapes = [
        (width, 3 * width),
        (width, width),
        (width, spec.router.experts),
        (width, expert_width),
        (expert_width, width),
        (pooled_width, len(spec.head.labels)),
    ]
    if spec.embedding.bigram_buckets:
        shapes.append((spec.embedding.bigram_width, width))
    for inputs, outputs in shapes:
        _add(digest, invariant.linear(_numbers(device, ROWS, inputs), _numbers(device, outputs, inputs)))
    _add(digest, invariant.linear(_numbers(device, MANY_ROWS, width), _numbers(device, expert_width, width)))
    rows = _numbers(device, ROWS, width)
    _add(digest, F.layer_norm(rows, (width,), eps=spec.norm.eps))
    _add(digest, invariant.silu(rows * 8))
    _add(digest, torch.softmax(_numbers(device, ROWS, spec.router.experts), dim=-1))
    for length in (ROWS, 8 * ROWS):
        q = _numbers(device, 1, heads, length, width // heads)
        lengths = torch.tensor([length - 3], device=device)
        _add(digest, invariant.bidirectional_attention(q, q.flip(2), q * 0.5, lengths))
    _add(digest, rows.mean(dim=0))
    fingerprint = digest.hexdigest()[:HEX_DIGITS]
    features = torch.backends.cpu.get_cpu_capability() if device.type == "cpu" else torch.cuda.get_device_name(device)
    name = f"{device.type}-fp32 {features} torch-{torch.__version__} {fingerprint}"
    return Profile(fingerprint, name)


def _numbers(device: torch.device, *shape: int) -> Tensor:
    """Numbers in [-1, 1] that are exact in fp32 and depend on no generator."""
    count = torch.Size(shape).numel()
    return ((torch.arange(count, device=device) * 7919 % 2039 - 1019) / 1024.0).view(shape)


def _add(digest: hashlib._Hash, result: Tensor) -> None:
    digest.update(result.float().contiguous().cpu().numpy().tobytes())
