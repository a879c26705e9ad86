"""The full model's forward pass beside a plain torch forward of the same weights, as a child of `classify`.

    python -m benchmarks.classify_forward MODEL THREADS

The plain one pads a batch to its longest text and uses torch's own operations as they are.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.child import serve
from benchmarks.rounds import median_ms_of
from expertmesh.checkpoint.load import StageLoader
from expertmesh.checkpoint.tokenizer import load_classifier_tokenizer
from expertmesh.model.embedding import BIGRAM_MULTIPLIER, FIRST_TOKEN_PREDECESSOR
from expertmesh.model.full import FullModel

TOLERANCE = 1e-3


class PlainForward:
    """A classifier as one writes it in torch without a thought of bits.

    Args:
        model: Whose weights it uses: layer norms, bidirectional attention, a softmax router, no dense layers.
    """

    def __init__(self, model: FullModel) -> None:
        self._model: Any = model
        spec = model.spec
        assert spec.attention.kind == "bidirectional"
        assert spec.router.score == "softmax"
        assert spec.norm.kind == "layernorm"
        assert spec.head.pool == "mean_max"
        self._spec = spec

    def __call__(self, ids_T: Tensor, lengths_B: Tensor) -> Tensor:
        """Token ids, one text after another, and tokens of each text, to logits_BC."""
        inside_BL = torch.arange(int(lengths_B.max()))[None, :] < lengths_B[:, None]
        ids_BL = torch.zeros(inside_BL.shape, dtype=torch.int64)
        ids_BL[inside_BL] = ids_T
        x = self._embedded(ids_BL)
        for gating, experts in zip(self._model.gating, self._model.experts, strict=True):
            x = x + self._attention(gating, self._norm(gating.attention_norm, x), inside_BL)
            normed = self._norm(gating.expert_norm, x)
            x[inside_BL] += self._experts(gating, experts, normed[inside_BL])
        head = self._model.classifier
        x = self._norm(head.norm, x)
        mean = (x * inside_BL[:, :, None]).sum(1) / lengths_B[:, None]
        most = x.masked_fill(~inside_BL[:, :, None], float("-inf")).amax(1)
        logits_BC: Tensor = F.linear(torch.cat([mean, most], 1), head.out.weight, head.out.bias)
        return logits_BC

    def _embedded(self, ids_BL: Tensor) -> Tensor:
        embedding = self._model.embedding
        x = F.embedding(ids_BL, embedding.token.weight) + embedding.position.weight[: ids_BL.shape[1]]
        if embedding.bigram_buckets:
            previous_BL = F.pad(ids_BL[:, :-1], (1, 0), value=FIRST_TOKEN_PREDECESSOR)
            hashed_BL = (previous_BL * BIGRAM_MULTIPLIER + ids_BL) % embedding.bigram_buckets
            x = x + F.linear(F.embedding(hashed_BL, embedding.bigram.weight), embedding.bigram_out.weight)
        embedded: Tensor = x
        return embedded

    def _norm(self, norm: Any, x: Tensor) -> Tensor:
        normed: Tensor = F.layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)
        return normed

    def _attention(self, gating: Any, x: Tensor, inside_BL: Tensor) -> Tensor:
        rows, length, width = x.shape
        qkv = F.linear(x, gating.qkv.weight, gating.qkv.bias).view(rows, length, 3, gating.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=inside_BL[:, None, None, :])
        return F.linear(mixed.transpose(1, 2).reshape(rows, length, width), gating.out.weight, gating.out.bias)

    def _experts(self, gating: Any, experts: Any, rows_TD: Tensor) -> Tensor:
        scores_TE = F.linear(rows_TD, gating.router.weight, gating.router.bias).softmax(-1)
        weights_TK, ids_TK = scores_TE.topk(self._spec.router.top_k, dim=-1)
        if self._spec.router.renormalise:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        out_TD = torch.zeros_like(rows_TD)
        for number, expert in enumerate(experts):
            tokens, choices = torch.where(ids_TK == number)
            if len(tokens):
                own = rows_TD[tokens]
                inner = F.silu(F.linear(own, expert.gate.weight)) * F.linear(own, expert.up.weight)
                out_TD.index_add_(0, tokens, F.linear(inner, expert.down.weight) * weights_TK[tokens, choices, None])
        return out_TD


def main(folder: str, threads: str) -> None:
    """Answers {"way", "texts", "batch", "seconds"} with the median milliseconds of a pass; `way` is own or plain."""
    torch.set_num_threads(int(threads))
    loader = StageLoader(Path(folder), torch.device("cpu"))
    tokenizer = load_classifier_tokenizer(Path(folder), loader.manifest)
    model = loader.full_model()
    unpacked = FullModel(loader.spec)  # the loader packs weights, which plain operations cannot read
    unpacked.load_state_dict(model.state_dict())
    plain = PlainForward(unpacked)
    ways: dict[str, Callable[..., Tensor]] = {"own": lambda *inputs: model(*inputs).logits_BC, "plain": plain}

    def answer(way: str, texts: list[str], batch: int, seconds: float) -> float:
        inputs = []
        enough = texts * -(-batch // len(texts))
        for start in range(0, len(enough) - batch + 1, batch):
            encoded = tokenizer.encode(enough[start : start + batch], loader.spec.context)
            inputs.append((torch.from_numpy(encoded.ids_T).long(), torch.from_numpy(encoded.lengths_B).long()))
        with torch.inference_mode():
            assert torch.allclose(ways["own"](*inputs[0]), ways["plain"](*inputs[0]), atol=TOLERANCE)
            turns = cycle(inputs)
            return median_ms_of(lambda: ways[way](*next(turns)), seconds)

    serve(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
