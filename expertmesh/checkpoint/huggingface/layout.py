"""Where the tensors of a part lie in a Hugging Face checkpoint, told by the names that are there.

Experts come in three layouts: each with tensors of its own, all of a layer in one tensor [E, 2F, D] with the gates
first, or as gpt-oss has them, transposed, with gate and up in turns, in bf16 or in MXFP4.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from expertmesh.checkpoint.huggingface.families.family import Family
from expertmesh.checkpoint.huggingface.interleaved import interleaved_expert
from expertmesh.checkpoint.manifest import model_parts
from expertmesh.checkpoint.parts import check_dtype
from expertmesh.checkpoint.shapes import PartShapes
from expertmesh.checkpoint.tensor_file import PartTensor, StoredTensor
from expertmesh.errors import BadCheckpoint
from expertmesh.model.spec import ModelSpec

EMBEDDING, HEAD = "model.embed_tokens", "lm_head"

# A stem of ours, and what it is called on disk: the first of these that is there.
_STEMS = {
    "attention_norm": ("input_layernorm",),
    "expert_norm": ("post_attention_layernorm",),
    "q": ("self_attn.q_proj",),
    "k": ("self_attn.k_proj",),
    "v": ("self_attn.v_proj",),
    "out": ("self_attn.o_proj",),
    "q_norm": ("self_attn.q_norm",),
    "k_norm": ("self_attn.k_norm",),
    "sinks": ("self_attn.sinks",),
    "q_down": ("self_attn.q_a_proj",),
    "q_down_norm": ("self_attn.q_a_layernorm",),
    "q_up": ("self_attn.q_b_proj",),
    "kv_down": ("self_attn.kv_a_proj_with_mqa",),
    "latent_norm": ("self_attn.kv_a_layernorm",),
    "kv_up": ("self_attn.kv_b_proj",),
    "router": (
        "mlp.gate",
        "mlp.router",
        "block_sparse_moe.gate",
        "block_sparse_moe.router.layer",
        "block_sparse_moe.router",
    ),
    "selection_bias": ("mlp.gate.e_score_correction_bias",),
    "shared_gate": ("mlp.shared_expert_gate",),
    "shared.gate": ("mlp.shared_expert.gate_proj", "mlp.shared_experts.gate_proj"),
    "shared.up": ("mlp.shared_expert.up_proj", "mlp.shared_experts.up_proj"),
    "shared.down": ("mlp.shared_expert.down_proj", "mlp.shared_experts.down_proj"),
    "dense.gate": ("mlp.gate_proj",),
    "dense.up": ("mlp.up_proj",),
    "dense.down": ("mlp.down_proj",),
}
_OWN = (
    ("mlp.experts", {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}),
    ("block_sparse_moe.experts", {"gate": "w1", "up": "w3", "down": "w2"}),
)
_FUSED = (
    ("mlp.experts.gate_up_proj", "mlp.experts.down_proj"),
    ("block_sparse_moe.experts.gate_up_proj", "block_sparse_moe.experts.down_proj"),
    ("block_sparse_moe.input_linear.weight", "block_sparse_moe.output_linear.weight"),
)
_INVERSE_FREQUENCIES = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_PART = re.compile(r"(gating|experts)/layer-(\d+)(?:/expert-(\d+))?")


class Layout:
    """The tensors of every part, none of them read yet.

    Args:
        tensors: What the checkpoint has.
        spec: What the model is.
        family: What its model type is.
        is_tied: Whether the head's matrix is that of the embedding.

    Raises:
        BadCheckpoint: A tensor is missing, has another shape or dtype than the spec needs, or belongs nowhere.
    """

    def __init__(self, tensors: Mapping[str, StoredTensor], spec: ModelSpec, family: Family, is_tied: bool) -> None:
        self._tensors = tensors
        self._spec = spec
        self._family = family
        self._is_tied = is_tied
        self._used: set[str] = set()
        shapes = PartShapes(spec)
        self.parts = {part: self._part(part, shapes.of(part)) for part in model_parts(spec)}
        self._check_rest()

    def _part(self, part: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, PartTensor]:
        if match := _PART.fullmatch(part):
            prefix = f"model.layers.{int(match[2])}."
            if match[3] is not None:
                return self._expert(prefix, int(match[3]))
            return {name: self._plain(prefix, name, shape) for name, shape in shapes.items()}
        if part == "embedding":
            return {"token.weight": self.take((f"{EMBEDDING}.weight",), shapes["token.weight"])}
        out = EMBEDDING if self._is_tied else HEAD
        names = {"norm": "model.norm", "out": out}
        found: dict[str, PartTensor] = {}
        for name, shape in shapes.items():
            stem, _, leaf = name.partition(".")
            found[name] = self.take((f"{HEAD if name == 'out.bias' else names[stem]}.{leaf}",), shape)
        return found

    def _plain(self, prefix: str, name: str, shape: tuple[int, ...]) -> StoredTensor:
        stem, dot, leaf = (name, "", "") if name in _STEMS else name.rpartition(".")
        return self.take(tuple(f"{prefix}{theirs}{dot}{leaf}" for theirs in _STEMS[stem]), shape)

    def _expert(self, prefix: str, expert: int) -> dict[str, PartTensor]:
        if self._family.has_interleaved_experts:
            return interleaved_expert(self.take, self.has, f"{prefix}mlp.experts.", expert, self._spec)
        experts, width, inner = self._spec.router.experts, self._spec.width, self._spec.expert.width
        for both, down in _FUSED:
            if self.has(f"{prefix}{both}"):
                gate_up = self.take((f"{prefix}{both}",), (experts, 2 * inner, width))[expert]
                out = self.take((f"{prefix}{down}",), (experts, width, inner))[expert]
                return {
                    "gate.weight": gate_up.rows(0, inner),
                    "up.weight": gate_up.rows(inner, 2 * inner),
                    "down.weight": out,
                }
        block, stems = next((own for own in _OWN if self.has(_own_name(prefix, own, 0))), _OWN[0])
        shapes = {"gate": (inner, width), "up": (inner, width), "down": (width, inner)}
        return {
            f"{stem}.weight": self.take((f"{prefix}{block}.{expert}.{theirs}.weight",), shapes[stem])
            for stem, theirs in stems.items()
        }

    def has(self, name: str) -> bool:
        """Whether the checkpoint has a tensor."""
        return name in self._tensors

    def take(self, names: tuple[str, ...], shape: tuple[int, ...], dtype: torch.dtype | None = None) -> StoredTensor:
        """The tensor with the first of these names that is there.

        Raises:
            BadCheckpoint: There is none, or it has another shape or dtype.
        """
        tensor = next((self._tensors[name] for name in names if name in self._tensors), None)
        if tensor is None:
            raise BadCheckpoint(f"the checkpoint misses tensor {' or '.join(map(repr, names))}")
        if tensor.shape != shape:
            raise BadCheckpoint(
                f"{tensor.path}: tensor {tensor.name!r} has shape {list(tensor.shape)}, config.json needs {list(shape)}"
            )
        if dtype is None:
            check_dtype(str(tensor.path), tensor.name, tensor.dtype)
        elif tensor.dtype != dtype:
            raise BadCheckpoint(f"{tensor.path}: tensor {tensor.name!r} has dtype {tensor.dtype}, not {dtype}")
        self._used.add(tensor.name)
        return tensor

    def _check_rest(self) -> None:
        """Refuses tensors that no part uses, but for those that are known not to matter."""
        layers = self._spec.layers
        for name, tensor in self._tensors.items():
            if name in self._used or _INVERSE_FREQUENCIES.fullmatch(name):
                continue
            number = re.match(r"model\.layers\.(\d{1,6})\.", name)
            is_later = number is not None and int(number[1]) >= layers
            if is_later and self._family.has_predictors and self.has(f"model.layers.{int(number[1])}.eh_proj.weight"):  # type: ignore[index]
                continue
            if self._is_tied and name == f"{HEAD}.weight":
                self._check_tie(tensor)
                continue
            hint = f"; config.json says {layers} layers" if is_later else ""
            raise BadCheckpoint(f"{tensor.path}: tensor {name!r} has no place in a {self._family.model_type}{hint}")

    def _check_tie(self, head: StoredTensor) -> None:
        embedding = self.take((f"{EMBEDDING}.weight",), head.shape, head.dtype)
        if not all(torch.equal(one, other) for one, other in zip(head.chunks(), embedding.chunks(), strict=True)):
            raise BadCheckpoint(f"{head.path}: config.json ties {HEAD}.weight to {EMBEDDING}.weight, but they differ")


def _own_name(prefix: str, own: tuple[str, dict[str, str]], expert: int) -> str:
    return f"{prefix}{own[0]}.{expert}.{own[1]['gate']}.weight"
