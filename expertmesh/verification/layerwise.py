"""A split against the folder that it was made from, one part in memory at a time, in one process.

What is proved is that what the services load is the original. Of every part, the tensors in its file are compared with
the original's, bit by bit, after what an import does to them: names, order of rows, transposition, MXFP4 to bf16. Then
the stage is loaded as a service loads it, and once more from the original's tensors; both compute the same rows, and
what they give has to have the same bits. The rows are those that made-up token ids have in that layer, so a model too
large for one machine goes through it part after part, with a KV cache of a few tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from expertmesh.checkpoint.load import StageLoader
from expertmesh.checkpoint.manifest import classifier_part, embedding_part, expert_part, gating_part, model_parts
from expertmesh.checkpoint.sources import Source, open_source
from expertmesh.checkpoint.tensor_file import PartTensor
from expertmesh.dispatch import Applied, ApplyExperts, Embed, Gate, Gated, Score, Scores, StageCall, classify, drive
from expertmesh.model.attention import gating_stage
from expertmesh.model.cache import KeyValueCache, blocks_of
from expertmesh.model.cached_sequences import CachedSequences
from expertmesh.model.embedding import EmbeddingStage
from expertmesh.model.head import head
from expertmesh.model.layers import DTYPES, GatedMLP, narrow
from expertmesh.model.sequences import Sequences
from expertmesh.model.spec import ModelSpec
from expertmesh.model.tiles import Span
from expertmesh.verification.originals import (
    Place,
    Proof,
    bytes_of,
    compare_part,
    compare_tokenizer,
    spec_faults,
    whole,
)

LENGTHS = (13, 3, 1)  # tokens of the sequences that go through the layers
IDLE_ROWS = 2  # that an expert computes which no token was sent to
TOKENIZER, EMBEDDING, HEAD = "tokenizer", "embedding", "head"

Progress = Callable[[str, int, int], None]
Observer = Callable[[StageCall, Any], None]


def prove(
    split: Path,
    original: Path,
    progress: Progress,
    sequences: Sequence[Sequence[int]] = (),
    observe: Observer = lambda call, result: None,
) -> Proof:
    """Compares a split with its original.

    Args:
        split: The folder of parts.
        original: What it was made from: a Hugging Face folder, a trained checkpoint or another split.
        progress: Is told (part, parts done, parts in all).
        sequences: Token ids that go through the layers; a few made-up ones by default.
        observe: Is shown every stage call and what the split's stages answer.

    Raises:
        BadCheckpoint: One of them is missing, damaged or not understood.
    """
    loader = StageLoader(split, torch.device("cpu"))
    source = _open(original, loader.spec)
    proof = Proof(spec_faults(loader.spec, source.spec))
    compare_tokenizer(split, loader.manifest, source.tokenizer_files(), proof.place(TOKENIZER))
    if not sequences:
        chance = torch.Generator().manual_seed(0)
        lengths = [min(length, loader.spec.context) for length in LENGTHS]
        sequences = [
            torch.randint(0, loader.spec.embedding.vocab, (length,), generator=chance).tolist() for length in lengths
        ]
    lengths = [len(ids) for ids in sequences]
    prover = _Prover(loader, source, proof, progress, lengths)
    ids_T = torch.tensor([id_ for ids in sequences for id_ in ids])

    def answer(call: StageCall) -> Any:
        result = prover.answer(call)
        observe(call, result)
        return result

    with torch.inference_mode():
        drive(classify(loader.spec, ids_T, torch.tensor(lengths)), answer)
    return proof


class _Prover:
    """Answers stage calls twice, by stages from the split and from the original; goes on with the split's answer."""

    def __init__(
        self, loader: StageLoader, source: Source, proof: Proof, progress: Progress, lengths: Sequence[int]
    ) -> None:
        self._loader = loader
        self._source = source
        self._spec = loader.spec
        self._proof = proof
        self._progress = progress
        self._parts = sum(1 for _ in model_parts(self._spec))
        self._done = 0
        self._layouts = (self._layout(lengths), self._layout(lengths))
        self._gated = Gated(None)

    def answer(self, call: StageCall) -> Any:
        match call:
            case Embed(ids_T=ids_T):
                place = self._proof.place(EMBEDDING)
                stages = self._stages(
                    place, embedding_part(), self._loader.embedding, lambda: EmbeddingStage(self._spec)
                )
                return self._same(place, embedding_part(), *self._both(stages, ids_T))
            case Gate(layer=layer, x_TD=x_TD):
                return self._gate(layer, x_TD)
            case ApplyExperts():
                return self._apply(call)
            case Score(x_TD=x_TD):
                return self._score(x_TD)

    def _gate(self, layer: int, x_TD: Tensor) -> Gated:
        place, part = self._proof.place(f"layer {layer}"), gating_part(layer)
        stages = self._stages(place, part, lambda: self._loader.gating(layer), lambda: gating_stage(self._spec, layer))
        ours, theirs = self._both(stages, x_TD)
        for name in ("residual_TD", "expert_input_TD", "expert_ids_TK", "weights_TK"):
            if getattr(ours, name) is not None:
                self._same(place, part, getattr(ours, name), getattr(theirs, name))
        self._gated = ours
        return self._gated

    def _apply(self, call: ApplyExperts) -> Applied:
        place = self._proof.place(f"layer {call.layer}")
        given = []
        for expert, rows_ND in enumerate(torch.split(call.rows_ND, call.counts_E.tolist())):
            part = expert_part(call.layer, expert)
            stages = self._stages(
                place,
                part,
                functools.partial(self._loader.expert, call.layer, expert),
                lambda: GatedMLP(self._spec.width, self._spec.expert),
            )
            rows = rows_ND if len(rows_ND) else self._gated.expert_input_TD[:IDLE_ROWS]
            ours = self._same(place, part, *(stage(rows) for stage in stages))
            if len(rows_ND):
                given.append(ours)
        return Applied(torch.cat(given).float())

    def _score(self, x_TD: Tensor) -> Scores:
        place, part = self._proof.place(HEAD), classifier_part()
        stages = self._stages(place, part, self._loader.classifier, lambda: head(self._spec))
        if self._spec.generates:
            return Scores(self._same(place, part, *(stage(x_TD) for stage in stages)), None)
        ours, theirs = self._both(stages, x_TD)
        return Scores(self._same(place, part, ours.logits_BC, theirs.logits_BC), ours.probabilities_BC)

    def _both(self, stages: tuple[nn.Module, nn.Module], x_TD: Tensor) -> list[Any]:
        """What two stages make of the same rows, each with a KV cache of its own."""
        return [stage(x_TD, layout) for stage, layout in zip(stages, self._layouts, strict=True)]

    def _stages(
        self, place: Place, part: str, load: Callable[[], nn.Module], make: Callable[[], nn.Module]
    ) -> tuple[nn.Module, nn.Module]:
        """A stage as a service loads it, and one of the original's tensors; the tensors themselves are compared too."""
        ours, tensors = load(), self._originals(part)
        compare_part(self._loader.folder, self._loader.manifest, part, tensors, place)
        with torch.device("meta"):
            theirs = make()
        wanted = theirs.state_dict()
        given = {name: whole(tensor) for name, tensor in tensors.items()}
        if {name: value.shape for name, value in wanted.items()} != {
            name: value.shape for name, value in given.items()
        }:
            place.faults.append(f"{part}: the original's tensors are not those of the spec")
            return ours, ours
        theirs.load_state_dict({name: value.to(wanted[name].dtype) for name, value in given.items()}, assign=True)
        self._done += 1
        self._progress(part, self._done, self._parts)
        return ours, narrow(theirs.eval().requires_grad_(False), DTYPES[self._spec.dtype])

    def _originals(self, part: str) -> Mapping[str, PartTensor]:
        try:
            return self._source.part(part)
        except KeyError:  # it is another model, with fewer layers or experts
            return {}

    def _same(self, place: Place, part: str, ours: Tensor, theirs: Tensor) -> Tensor:
        place.outputs += ours.numel()
        if ours.shape != theirs.shape or not torch.equal(bytes_of(ours), bytes_of(theirs)):
            place.faults.append(f"{part}: stages of both give other bits for the same rows")
        return ours

    def _layout(self, lengths: Sequence[int]) -> Sequences:
        if not self._spec.generates:
            return Sequences(torch.tensor(lengths))
        spans, used = [], 0
        for length in lengths:
            spans.append(Span(range(used, used + blocks_of(length)), 0, length))
            used += blocks_of(length)
        cache = KeyValueCache(self._spec, used, self._loader.device)
        return CachedSequences(spans, cache, self._loader.rotary(), self._loader.device)


def _open(folder: Path, spec: ModelSpec) -> Source:
    """The original as it was imported: with the dtype of the split, and its context where that is another one."""
    source = open_source(folder, spec.dtype)
    return source if source.spec.context == spec.context else open_source(folder, spec.dtype, spec.context)
