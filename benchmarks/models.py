"""Models with random weights, made in a process of its own, so that a benchmark's own process need not hold torch.

python -m benchmarks.models NAME FOLDER
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.child import ROOT
from benchmarks.layer_case import EXPERT_WIDTH, EXPERTS, TOP_K, WIDTH
from expertmesh.model.spec import AttentionSpec, EmbeddingSpec, ExpertSpec, HeadSpec, ModelSpec, RouterSpec

HEADLINES = ROOT / "examples" / "headlines.txt"
MIXTRAL_VOCAB, MIXTRAL_LAYERS = 4096, 6
SMALL_LAYERS = 4
LAYER = ModelSpec(
    width=WIDTH,
    layers=1,
    context=64,
    embedding=EmbeddingSpec(vocab=1),
    attention=AttentionSpec(heads=8),
    router=RouterSpec(experts=EXPERTS, top_k=TOP_K),
    expert=ExpertSpec(width=EXPERT_WIDTH),
    head=HeadSpec(labels=("first", "second")),
)


@contextmanager
def random_model(name: str) -> Iterator[Path]:
    """The folder of a split model, which goes away again; beside it the folder `source` that it was split from."""
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        subprocess.run([sys.executable, "-m", __name__, name, folder], check=True, cwd=ROOT, env=environment)
        yield Path(folder) / "split"


def classifier(spec: ModelSpec) -> Callable[[Path], None]:
    """Writes a classifier of this spec, but for the size of its vocabulary."""

    def write(folder: Path) -> None:
        import safetensors.torch
        import torch

        from expertmesh.checkpoint.split import SPEC_FILE, WEIGHTS_FILE
        from expertmesh.model.full import FullModel
        from expertmesh.train.settings import TokenizerConfig
        from expertmesh.train.vocabulary import make_tokenizer

        tokenizer = make_tokenizer(HEADLINES.read_text().splitlines(), TokenizerConfig(), 500, folder / "tokenizer")
        sized = replace(spec, embedding=replace(spec.embedding, vocab=tokenizer.vocab))
        torch.manual_seed(1)
        weights = FullModel(sized).state_dict()
        (folder / SPEC_FILE).write_text(json.dumps(sized.to_dict()))
        safetensors.torch.save_file(
            {name: value.contiguous() for name, value in weights.items()}, folder / WEIGHTS_FILE
        )

    return write


def mixtral(folder: Path) -> None:
    """Writes a checkpoint of transformers' own Mixtral: hidden 512, 6 layers, 8 experts of width 1024, top-2, fp32."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import MixtralConfig, MixtralForCausalLM

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(first + second for first in letters for second in letters)][:MIXTRAL_VOCAB]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = MixtralConfig(
        vocab_size=MIXTRAL_VOCAB,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=MIXTRAL_LAYERS,
        num_attention_heads=8,
        num_key_value_heads=4,
        num_local_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=1,
    )
    torch.manual_seed(1)
    MixtralForCausalLM(config).save_pretrained(folder)


def small(experts: int) -> ModelSpec:
    """A classifier that computes next to nothing, for benchmarks that simulate devices."""
    return replace(
        LAYER, width=32, layers=SMALL_LAYERS, router=RouterSpec(experts=experts, top_k=2), expert=ExpertSpec(width=32)
    )


WRITERS = {
    "layer": classifier(LAYER),
    "mixtral": mixtral,
    "small-8": classifier(small(8)),
    "small-64": classifier(small(64)),
}


def main(name: str, folder: str) -> None:
    """Writes and splits a model."""
    from expertmesh.checkpoint.split import split

    source = Path(folder) / "source"
    source.mkdir()
    WRITERS[name](source)
    split(source, Path(folder) / "split")


if __name__ == "__main__":
    main(*sys.argv[1:])
