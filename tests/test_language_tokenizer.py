from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.checkpoint.manifest import Manifest, Part
from expertmesh.checkpoint.tokenizer import load_classifier_tokenizer, load_tokenizer
from expertmesh.errors import BadCheckpoint
from expertmesh.tokenization.language import LanguageTokenizer
from tests import tiny

CHECKPOINTS = Path(__file__).parent / "fixtures" / "checkpoints"
FAMILIES = ("deepseek_v3", "mixtral", "olmoe", "qwen3_moe")
BYTES2TEXT = st.binary(max_size=40).map(lambda data: data.decode("utf-8", "replace"))
ANY_TEXT = st.one_of(st.text(max_size=80), st.text("ab \n\t<s>/é你🎉", max_size=80), BYTES2TEXT)
PLAIN_TEXT = ANY_TEXT.filter(lambda text: "<" not in text)
IDS = st.lists(st.integers(0, 511), max_size=60)


@cache
def loaded(family: str) -> LanguageTokenizer:
    return LanguageTokenizer.load(CHECKPOINTS / family)


@cache
def raw(family: str) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(CHECKPOINTS / family / "tokenizer.json"))


@cache
def transformers_tokenizer(family: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(CHECKPOINTS / family)


@cache
def pieces() -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(CHECKPOINTS / "mixtral" / "tokenizer.model"))


def pieces_folder(folder: Path, **config: Any) -> Path:
    """A folder with a SentencePiece model and no tokenizer.json."""
    shutil.copy(CHECKPOINTS / "mixtral" / "tokenizer.model", folder)
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@cache
def loaded_pieces() -> LanguageTokenizer:
    return LanguageTokenizer.load(pieces_folder(tiny.scratch()))


def copied(family: str, folder: Path) -> Path:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINTS / family / name, folder)
    return folder


def changed_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# The same ids and texts as the originals.


@pytest.mark.parametrize("family", FAMILIES)
@given(text=ANY_TEXT)
@settings(max_examples=50, deadline=None)
def test_ids_are_those_of_transformers(family: str, text: str) -> None:
    original = transformers_tokenizer(family)
    assert loaded(family).encode(text) == original(text).input_ids
    assert loaded(family).encode(text, special=False) == original(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("family", FAMILIES)
@given(ids=IDS)
@settings(max_examples=50, deadline=None)
def test_texts_are_those_of_transformers(family: str, ids: list[int]) -> None:
    expected = transformers_tokenizer(family).decode(ids, skip_special_tokens=True)
    assert loaded(family).decode([ids, ids[:3]])[0] == expected


@pytest.mark.parametrize("family", FAMILIES)
@given(text=ANY_TEXT)
@settings(max_examples=50, deadline=None)
def test_round_trips_are_those_of_the_tokenizers_library(family: str, text: str) -> None:
    ids = raw(family).encode(text, add_special_tokens=False).ids
    assert loaded(family).encode(text, special=False) == ids
    assert loaded(family).decode([ids]) == [raw(family).decode(ids)]


@pytest.mark.parametrize("family", FAMILIES)
@given(text=PLAIN_TEXT)
@settings(max_examples=50, deadline=None)
def test_a_plain_text_comes_back(family: str, text: str) -> None:
    tokenizer = loaded(family)
    assert tokenizer.decode([tokenizer.encode(text)]) == [text]


@given(text=PLAIN_TEXT)
@settings(max_examples=100, deadline=None)
def test_round_trips_are_those_of_sentencepiece(text: str) -> None:
    ids = pieces().encode(text)
    assert loaded_pieces().encode(text, special=False) == ids
    assert loaded_pieces().encode(text) == [pieces().bos_id(), *ids]
    assert loaded_pieces().decode([ids]) == [pieces().decode(ids)]


@given(ids=st.lists(st.integers(3, 511), max_size=60))
@settings(max_examples=100, deadline=None)
def test_texts_of_any_pieces_are_those_of_sentencepiece(ids: list[int]) -> None:
    assert loaded_pieces().decode([ids]) == [pieces().decode(ids)]


def test_half_a_character_is_shown_as_unknown() -> None:
    for tokenizer in (loaded("olmoe"), loaded("mixtral"), loaded_pieces()):
        ids = tokenizer.encode("a 🎉", special=False)
        assert tokenizer.decode([ids])[0] == "a 🎉"
        assert tokenizer.decode([ids[:-1]])[0].endswith("\ufffd")


def test_special_and_foreign_ids_have_no_text() -> None:
    for tokenizer in (loaded("olmoe"), loaded("mixtral"), loaded_pieces()):
        ids = tokenizer.encode("to be", special=False)
        assert tokenizer.vocab == 512
        assert tokenizer.decode([[1, *ids, 512, 2, 9999, 2**31 - 1], [0], []]) == ["to be", "", ""]


# What the smaller files say.


def test_pieces_take_special_tokens_in_a_text_as_their_ids() -> None:
    first, rest = pieces().encode("hi"), pieces().encode("there")
    ids = loaded_pieces().encode("<s>hi</s>", special=False)
    assert (ids[0], ids[-1]) == (1, 2)
    assert loaded_pieces().decode([ids]) == ["hi"]
    ids = loaded_pieces().encode("hi</s>there", special=False)
    assert ids[: len(first) + 1] == [*first, 2]
    assert pieces().id_to_piece(ids[-1]) == pieces().id_to_piece(rest[-1])
    assert not any(pieces().id_to_piece(id_).startswith("▁") for id_ in ids[len(first) :])


def test_legacy_pieces_have_a_space_behind_every_special_token(tmp_path: Path) -> None:
    tokenizer = LanguageTokenizer.load(pieces_folder(tmp_path, legacy=True))
    assert tokenizer.encode("hi</s>there", special=False) == [*pieces().encode("hi"), 2, *pieces().encode("there")]


@pytest.mark.parametrize(
    ("config", "before", "after"),
    [
        ({"add_bos_token": True, "add_eos_token": True}, [1], [2]),
        ({"add_bos_token": False}, [], []),
        ({"add_eos_token": False}, [1], []),
        ({"bos_token": "</s>"}, [2], []),
        ({"bos_token": {"content": "</s>", "special": True}}, [2], []),
    ],
)
def test_pieces_get_the_marks_that_the_configuration_asks_for(
    config: dict[str, Any], before: list[int], after: list[int], tmp_path: Path
) -> None:
    tokenizer = LanguageTokenizer.load(pieces_folder(tmp_path, **config))
    assert tokenizer.encode("hi") == [*before, *pieces().encode("hi"), *after]


@pytest.mark.parametrize("key", ["added_tokens_decoder", "added_tokens.json"])
def test_pieces_with_added_tokens(key: str, tmp_path: Path) -> None:
    pieces_folder(tmp_path, bos_token="<s>", eos_token="<|end|>")
    if key == "added_tokens_decoder":
        added = {"512": {"content": "<|end|>", "special": True}, "513": {"content": "<tool>", "special": False}}
        changed_json(tmp_path / "tokenizer_config.json", added_tokens_decoder=added)
    else:
        (tmp_path / key).write_text(json.dumps({"<|end|>": 512, "<tool>": 513}))
    tokenizer = LanguageTokenizer.load(tmp_path)
    assert tokenizer.vocab == 514
    ids = tokenizer.encode("hi<tool> you<|end|>", special=False)
    assert ids[-1] == 512
    assert 513 in ids
    assert tokenizer.decode([ids]) == ["hi<tool> you"]


def test_a_tokenizer_json_decides_alone_about_marks(tmp_path: Path) -> None:
    folder = copied("olmoe", tmp_path)
    changed_json(folder / "tokenizer_config.json", add_bos_token=True, add_eos_token=True)
    assert LanguageTokenizer.load(folder).encode("hi") == loaded("olmoe").encode("hi")
    mark = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    changed_json(
        folder / "tokenizer.json",
        post_processor={
            "type": "TemplateProcessing",
            "single": [mark, text],
            "pair": [mark, text],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
    )
    tokenizer = LanguageTokenizer.load(folder)
    assert tokenizer.encode("hi") == [1, *loaded("olmoe").encode("hi")]
    assert tokenizer.encode("hi", special=False) == loaded("olmoe").encode("hi")


def test_neither_truncation_nor_padding_of_the_file_is_done(tmp_path: Path) -> None:
    changed_json(
        copied("olmoe", tmp_path) / "tokenizer.json",
        truncation={"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 90},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "<pad>",
        },
    )
    assert LanguageTokenizer.load(tmp_path).encode("to be or not to be") == loaded("olmoe").encode("to be or not to be")


def test_added_tokens_are_ids_of_their_own(tmp_path: Path) -> None:
    added = {"512": {"content": "<|user|>", "special": True, "normalized": False}}
    changed_json(copied("olmoe", tmp_path) / "tokenizer_config.json", added_tokens_decoder=added)
    tokenizer = LanguageTokenizer.load(tmp_path)
    assert tokenizer.vocab == 513
    assert tokenizer.encode("<|user|>hi") == [512, *loaded("olmoe").encode("hi")]
    assert tokenizer.decode([tokenizer.encode("<|user|>hi")]) == ["hi"]


def test_special_tokens_have_names(tmp_path: Path) -> None:
    assert loaded("olmoe").special_texts == {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    assert loaded_pieces().special_texts == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    copied("olmoe", tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<pad>"}}))
    assert LanguageTokenizer.load(tmp_path).special_texts["eos_token"] == "<pad>"


def test_the_chat_template_is_found_where_it_is(tmp_path: Path) -> None:
    config = copied("olmoe", tmp_path) / "tokenizer_config.json"
    assert not loaded("olmoe").has_chat_template
    changed_json(config, chat_template="old")
    assert LanguageTokenizer.load(tmp_path).chat_template == "old"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "listed"}]
    changed_json(config, chat_template=named)
    assert LanguageTokenizer.load(tmp_path).chat_template == "listed"
    (tmp_path / "chat_template.jinja").write_text("filed")
    assert LanguageTokenizer.load(tmp_path).chat_template == "filed"


# Folders that cannot be right.


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", pickle.dumps({"model": {}})),
        ("tokenizer.json", b"[" * 100_000),
        ("tokenizer_config.json", b"[]"),
        ("tokenizer_config.json", pickle.dumps({})),
        ("tokenizer_config.json", b"[" * 100_000),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"-1": {"content": "a"}}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"1": 2}}'),
        ("tokenizer_config.json", b'{"added_tokens_decoder": []}'),
        ("tokenizer_config.json", b'{"chat_template": 7}'),
        ("added_tokens.json", b'{"a": []}'),
        ("special_tokens_map.json", b"nothing"),
        ("chat_template.jinja", b"\xff"),
        ("chat_template.jinja", b"a" * (2**20 + 1)),
    ],
)
def test_a_damaged_file_is_refused_by_name(name: str, content: bytes, tmp_path: Path) -> None:
    (copied("olmoe", tmp_path) / name).write_bytes(content)
    with pytest.raises(BadCheckpoint, match=r"^[^\n]*$") as caught:
        LanguageTokenizer.load(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"no model", pickle.dumps([1, 2])])
def test_a_damaged_piece_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(BadCheckpoint, match=r"tokenizer\.model: is not a SentencePiece model"):
        LanguageTokenizer.load(tmp_path)


def test_a_folder_without_vocabulary_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadCheckpoint, match=r"neither tokenizer\.json nor tokenizer\.model"):
        LanguageTokenizer.load(tmp_path)


# Parts of a split model.


def split_with(folder: Path, vocab: int, **files: bytes) -> Manifest:
    """A manifest whose tokenizer is that of a language model, and its files."""
    (folder / "tokenizer").mkdir()
    parts = {}
    for name, content in files.items():
        part = f"tokenizer/{name.replace('__', '.')}"
        (folder / part).write_bytes(content)
        parts[part] = Part(part, len(content), hashlib.sha256(content).digest())
    spec = Manifest.read(tiny.model()).spec
    return Manifest("language", replace(spec, embedding=replace(spec.embedding, vocab=vocab)), parts)


def test_the_manifest_tells_which_kind_it_is(tmp_path: Path) -> None:
    content = (CHECKPOINTS / "olmoe" / "tokenizer.json").read_bytes()
    manifest = split_with(tmp_path, 512, tokenizer__json=content, chat_template__jinja=b"{{ bos_token }}")
    tokenizer = load_tokenizer(tmp_path, manifest)
    assert isinstance(tokenizer, LanguageTokenizer)
    assert tokenizer.has_chat_template
    with pytest.raises(BadCheckpoint, match="of a language model"):
        load_classifier_tokenizer(tmp_path, manifest)
    classifiers = Manifest.read(tiny.model())
    assert not isinstance(load_tokenizer(tiny.model(), classifiers), LanguageTokenizer)


def test_a_vocabulary_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    content = (CHECKPOINTS / "olmoe" / "tokenizer.json").read_bytes()
    manifest = split_with(tmp_path, 511, tokenizer__json=content)
    with pytest.raises(BadCheckpoint, match="512 ids, the embedding only 511 rows"):
        load_tokenizer(tmp_path, manifest)


def test_a_changed_template_is_refused(tmp_path: Path) -> None:
    content = (CHECKPOINTS / "olmoe" / "tokenizer.json").read_bytes()
    manifest = split_with(tmp_path, 512, tokenizer__json=content, chat_template__jinja=b"{{ bos_token }}")
    (tmp_path / "tokenizer" / "chat_template.jinja").write_bytes(b"{{ eos_token }}")
    with pytest.raises(BadCheckpoint, match="SHA-256"):
        load_tokenizer(tmp_path, manifest)


@pytest.mark.parametrize(
    ("names", "is_complete"),
    [
        (["normalizer.json", "tokenizer.model"], True),
        (["tokenizer.json"], True),
        (["tokenizer.model", "chat_template.jinja"], True),
        (["normalizer.json"], False),
        (["tokenizer_config.json"], False),
        ([], False),
    ],
)
def test_a_manifest_needs_a_tokenizer(names: list[str], is_complete: bool, tmp_path: Path) -> None:
    values = json.loads((tiny.model() / "manifest.json").read_text())
    plain = values["parts"]["tokenizer/tokenizer.model"]
    parts = {name: part for name, part in values["parts"].items() if not name.startswith("tokenizer/")}
    parts |= {f"tokenizer/{name}": plain | {"file": f"tokenizer/{name}"} for name in names}
    (tmp_path / "manifest.json").write_text(json.dumps(values | {"parts": parts}))
    if is_complete:
        assert Manifest.read(tmp_path).tokenizer_parts() == [f"tokenizer/{name}" for name in names]
    else:
        with pytest.raises(BadCheckpoint, match="misses parts"):
            Manifest.read(tmp_path)
