import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from expertmesh.errors import BadCheckpoint
from expertmesh.tokenization.normalizer import STEPS, Normalizer, plain_characters
from expertmesh.tokenization.tokenizer import Tokenizer
from expertmesh.train.config import TokenizerConfig
from expertmesh.train.vocabulary import make_tokenizer

TEXTS = [
    f"the {noun} {verb} the {noun} of team {n}"
    for n, noun in enumerate(("market", "match", "chip", "vote"))
    for verb in ("wins", "loses", "sells", "meets")
]

MARKUP = [
    "&lt;",
    "&amp;",
    " #39;",
    "#36;",
    "quot;",
    "& lt ;",
    "<b>",
    "</a",
    "<DELL.O>",
    "U.S.",
    " u . s . ",
    "n't",
    " n't",
]
WRITING = [
    "7,000",
    "34-20",
    "1.02",
    "--",
    "well-known",
    "\\",
    "\n",
    "İ",
    "ﬁ",
    "é",
    "ß",
    "Σ",
    "한",
    "٣",
    "\u0301",
    "\ud800",
]
FRAGMENTS = st.sampled_from(MARKUP + WRITING)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(TEXTS, TokenizerConfig(), 80, folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return Tokenizer.load(folder)


@given(st.text(st.characters(), max_size=60))
@example("a .' b . c")
@example("&amp;amp;lt;b&amp;gt;")
def test_normalising_twice_is_normalising_once(text):
    normalizer = Normalizer()
    once = normalizer(text)
    assert normalizer(once) == once


@given(st.lists(FRAGMENTS | st.text(max_size=3), max_size=12).map("".join))
def test_normalising_fragments_of_markup_twice_is_normalising_them_once(text):
    normalizer = Normalizer()
    once = normalizer(text)
    assert normalizer(once) == once
    assert "  " not in once
    assert once == once.strip()


def test_every_character_becomes_something_that_stays():
    codes = [*range(0x3000), *range(0x3000, 0x110000, 13)]
    plain = [plain_characters(chr(code)) for code in codes]
    assert [plain_characters(text) for text in plain] == plain


@pytest.mark.parametrize(
    ("raw", "tokenised"),
    [
        ("The U.S. won't pay $7,000.", "the u . s . wo n't pay $ 7,000 ."),
        ("Apple #39;s  quot;iPod quot;", "Apple 's `` iPod ''"),
        ("KANSAS CITY, Kan. (AP) --", "kansas city , kan . ( ap ) --"),
        ("merck  amp; co", "merck & co"),
        ("oil at  #36;46\\a barrel", "oil at $ 46 a barrel"),
        ("&lt;b&gt;...&lt;/b&gt; said", "& lt ; b & gt ; ... & lt ; / b & gt ; said"),
        ("a well-known café", "A well known cafe"),
    ],
)
def test_a_tokenised_copy_looks_like_its_original(raw, tokenised):
    normalizer = Normalizer()
    assert normalizer(raw) == normalizer(tokenised)


@pytest.mark.parametrize(
    ("raw", "normalised"),
    [
        ("Rangers win 34-20, 1.02 seconds", "rangers win 34-20 1.02 seconds"),
        ('<A HREF="x" target=/y>NOC.N</A> up', "noc . n up"),
        ("shares <DELL.O> 5 < 6", "shares dell . o 5 6"),
        ("cut off <img src='http://ad", "cut off"),
        ("&#x41;&#66;&eacute;&#9999999999;&nosuch;", "abe 9999999999"),
        ("\x00\u2603 \ud800", ""),
    ],
)
def test_normal_forms(raw, normalised):
    assert Normalizer()(raw).split() == normalised.split()


@pytest.mark.parametrize(
    "unit", ["a", "<", "<a ", "&", "&#", "1", "1.", "u.", "\u0300\u0316", "((", "quot;", "\u2603", " "]
)
def test_a_hostile_text_takes_no_longer_than_its_length(tokenizer, unit):
    text = (unit * 100_000)[:100_000]
    best = min(_seconds(lambda: tokenizer.encode([text], max_tokens=128)) for _ in range(5))
    assert best < 0.1


def _seconds(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def test_encoding_gives_flat_ids_lengths_and_what_was_cut(tokenizer):
    texts = ["the market wins", "", "the match of the match of the match of the match"]
    encoded = tokenizer.encode(texts, max_tokens=12)
    assert (encoded.ids_T.dtype, encoded.lengths_B.dtype, encoded.truncated_B.dtype) == (np.int32, np.int32, np.bool_)
    assert encoded.lengths_B[1] == 0
    assert encoded.lengths_B[2] == 12
    assert encoded.truncated_B.tolist() == [False, False, True]
    assert len(encoded.ids_T) == encoded.lengths_B.sum()
    alone = [tokenizer.encode([text], max_tokens=12).ids_T for text in texts]
    assert np.array_equal(np.concatenate(alone), encoded.ids_T)


def test_decoding_gives_the_normalised_text(tokenizer):
    assert tokenizer.decode(tokenizer.encode(["the market wins"], 64).ids_T.tolist()) == "the market wins"


def test_sampling_differs_between_seeds_and_not_within_one(tokenizer):
    samples = [tokenizer.sample(TEXTS, 64, alpha=0.1, seed=seed).ids_T.tolist() for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2]


def test_the_same_texts_make_the_same_vocabulary(folder, tmp_path):
    make_tokenizer(TEXTS, TokenizerConfig(), 80, tmp_path)
    for name in ("tokenizer.model", "normalizer.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.model", None),
        ("tokenizer.model", b""),
        ("tokenizer.model", b"\x00" * 100),
        ("normalizer.json", None),
        ("normalizer.json", b"{"),
        ("normalizer.json", b"\xff\xfe"),
        ("normalizer.json", b'{"steps": [], "version": 2}'),
        ("normalizer.json", b'{"steps": ["no such step"], "version": 1}'),
    ],
)
def test_a_damaged_tokenizer_is_refused_in_one_line(folder, tmp_path, name, content):
    for source in Path(folder).iterdir():
        (tmp_path / source.name).write_bytes(source.read_bytes())
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(BadCheckpoint) as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_truncated_vocabulary_is_refused(folder, tmp_path):
    model = (folder / "tokenizer.model").read_bytes()
    (tmp_path / "normalizer.json").write_text(json.dumps({"steps": list(STEPS), "version": 1}))
    (tmp_path / "tokenizer.model").write_bytes(model[: len(model) // 2])
    with pytest.raises(BadCheckpoint):
        Tokenizer.load(tmp_path)
