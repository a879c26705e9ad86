"""A Hugging Face folder as a source of parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from expertmesh.checkpoint.huggingface.config import (
    FILE_NAME,
    GENERATION_FILE,
    MAX_CONFIG_BYTES,
    Config,
    shown,
)
from expertmesh.checkpoint.huggingface.families import FAMILIES
from expertmesh.checkpoint.huggingface.families.family import Family
from expertmesh.checkpoint.huggingface.layout import Layout
from expertmesh.checkpoint.huggingface.weights import inside, read_tensors
from expertmesh.checkpoint.strict_json import read_file, read_object
from expertmesh.checkpoint.tensor_file import PartTensor
from expertmesh.errors import BadCheckpoint
from expertmesh.model.spec import ModelSpec

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
MAX_TOKENIZER_BYTES = 256 * 2**20


class HuggingFaceSource:
    """A folder with `config.json`, safetensors and tokenizer files.

    Args:
        folder: The folder.
        dtype: What the imported model computes in.
        context: Its context, or None for the model's own.

    Raises:
        BadCheckpoint: Something in the folder is missing, damaged, contradictory or not understood.
    """

    def __init__(self, folder: Path, dtype: str = "float32", context: int | None = None) -> None:
        self.name = folder.resolve().name
        self._folder = folder
        config = Config(read_object(inside(folder, FILE_NAME), MAX_CONFIG_BYTES), str(folder / FILE_NAME), context)
        family, spec, is_tied = read_model(config)
        self.kind = family.model_type
        ends = _end_ids(folder, config, family, spec.embedding.vocab)
        self.spec: ModelSpec = replace(spec, dtype=dtype, head=replace(spec.head, end_ids=ends))
        self._layout = Layout(read_tensors(folder), self.spec, family, is_tied)

    def part(self, name: str) -> Mapping[str, PartTensor]:
        """The tensors of one part, which are read when they are written."""
        return self._layout.parts[name]

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files, byte for byte."""
        files = {
            name: read_file(inside(self._folder, name), MAX_TOKENIZER_BYTES)
            for name in TOKENIZER_FILES
            if (self._folder / name).exists()
        }
        if not {"tokenizer.json", "tokenizer.model"} & files.keys():
            raise BadCheckpoint(f"{self._folder} has neither tokenizer.json nor tokenizer.model")
        return files


def read_model(config: Config) -> tuple[Family, ModelSpec, bool]:
    """The family of a configuration, its spec without end ids, and whether the head shares the embedding's matrix.

    Raises:
        BadCheckpoint: A key has a value that is not understood, or is not understood itself.
    """
    family = _family(config)
    config.with_defaults(family.defaults)
    spec = family.spec(config, family)
    is_tied = config.flag("tie_word_embeddings")
    _check_foreign(config, family)
    if family.has_predictors:
        config.value("num_nextn_predict_layers")  # those layers are left out
    config.check_all_read()
    return family, spec, is_tied


def _family(config: Config) -> Family:
    model_type = config.value("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise config.error(f"model_type {shown(model_type)} is not implemented; implemented: {known}")
    return FAMILIES[model_type]


def _check_foreign(config: Config, family: Family) -> None:
    """Refuses what would change the weights or the code."""
    quantization = config.table("quantization_config")
    method = quantization.get("quant_method")
    if quantization and not (method == "mxfp4" and family.has_interleaved_experts):
        raise config.error(f"quantization_config with quant_method {shown(method)} is not implemented")
    remote = config.table("auto_map")
    for key, code in remote.items():
        if code not in family.remote_code:
            raise config.error(
                f"auto_map wants {shown(code)} for {shown(key)}, and code of a checkpoint is never run;"
                f" take auto_map out of the file if the weights are those of a plain {family.model_type}"
            )
    config.only("trust_remote_code", False)
    for switch in ("is_encoder_decoder", "add_cross_attention", "tie_encoder_decoder", "tf_legacy_loss"):
        config.only(switch, False)
    config.only("is_decoder", False, True)
    if config.table("pruned_heads"):
        raise config.error("pruned_heads is not implemented")


def _end_ids(folder: Path, config: Config, family: Family, vocab: int) -> tuple[int, ...]:
    """The tokens that end an answer: of `generation_config.json`, else of `config.json`, else the class default."""
    generation: dict[str, Any] = {}
    if (folder / GENERATION_FILE).exists():
        generation = read_object(inside(folder, GENERATION_FILE), MAX_CONFIG_BYTES)
    file, given = GENERATION_FILE, generation.get("eos_token_id")
    if given is None:
        file, given = FILE_NAME, config.value("eos_token_id")
    ids = given if isinstance(given, list) else [] if given is None else [given]
    if not all(type(entry) is int and entry >= 0 for entry in ids):
        raise BadCheckpoint(f"{folder / file}: eos_token_id must be ids of tokens, not {shown(given)}")
    if any(entry >= vocab for entry in ids) and (file == GENERATION_FILE or config.has("eos_token_id")):
        raise BadCheckpoint(f"{folder / file}: eos_token_id {shown(given)} is beyond the vocabulary of {vocab}")
    return tuple(dict.fromkeys(entry for entry in ids if entry < vocab))
