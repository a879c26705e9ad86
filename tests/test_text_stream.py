from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertmesh.errors import InvalidInput
from expertmesh.tokenization.language import LanguageTokenizer
from expertmesh.tokenization.stop_strings import StopStrings
from expertmesh.tokenization.stream import TextStream
from tests import tiny

CHECKPOINTS = Path(__file__).parent / "fixtures" / "checkpoints"
KINDS = ("olmoe", "mixtral", "pieces")
VOCAB = 512
TEXT = st.text(st.sampled_from("ab c\n \té🎉你好👨\u200d👩\ufffd"), max_size=60)
STOPS = st.lists(st.text(st.sampled_from("ab c\né"), min_size=1, max_size=4), max_size=4)
GROUPS = st.lists(st.integers(1, 12), min_size=1, max_size=10)
BYTES = st.lists(st.integers(3, 258), max_size=120)
Decode = Callable[[Sequence[Sequence[int]]], list[str]]


@cache
def tokenizer(kind: str) -> LanguageTokenizer:
    if kind != "pieces":
        return LanguageTokenizer.load(CHECKPOINTS / kind)
    folder = tiny.scratch()
    shutil.copy(CHECKPOINTS / "mixtral" / "tokenizer.model", folder)
    return LanguageTokenizer.load(folder)


def pieces_of(stream: TextStream, ids: Sequence[int], decode: Decode, groups: Sequence[int] = (1,)) -> list[str]:
    """The pieces of a stream whose ids come in groups of these sizes, over and over."""
    pieces, at, turn = [], 0, 0
    while at < len(ids):
        for id_ in ids[at : at + groups[turn % len(groups)]]:
            stream.push(id_)
        at += groups[turn % len(groups)]
        turn += 1
        pieces.append(stream.take(decode(stream.windows())))
    return [*pieces, stream.finish()]


def cut(text: str, stops: Sequence[str]) -> tuple[str, str]:
    """The text before the stop string that starts first (the shortest of several), and that one."""
    found = min(((text.find(stop), len(stop), stop) for stop in stops if stop in text), default=(len(text), 0, ""))
    return text[: found[0]], found[2]


def check(kind: str, ids: list[int], groups: Sequence[int], stops: Sequence[str]) -> None:
    decode = tokenizer(kind).decode
    stream = TextStream(stops, VOCAB)
    pieces = pieces_of(stream, ids, decode, groups)
    expected, matched = cut(decode([ids])[0], stops)
    assert "".join(pieces) == expected
    assert (stream.stopped, stream.matched) == (bool(matched), matched)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXT, special=st.booleans(), groups=GROUPS, stops=STOPS)
@settings(max_examples=150, deadline=None)
def test_pieces_make_the_text(kind: str, text: str, special: bool, groups: list[int], stops: list[str]) -> None:
    check(kind, tokenizer(kind).encode(text, special), groups, stops)


@pytest.mark.parametrize("kind", KINDS)
@given(ids=st.one_of(st.lists(st.integers(0, 520), max_size=60), BYTES), groups=GROUPS, stops=STOPS)
@settings(max_examples=150, deadline=None)
def test_pieces_make_the_text_of_any_ids(kind: str, ids: list[int], groups: list[int], stops: list[str]) -> None:
    check(kind, ids, groups, stops)


@pytest.mark.parametrize("kind", KINDS)
def test_every_piece_is_whole_characters(kind: str) -> None:
    text = "naïve 🎉 你好 👨\u200d👩\u200d👧"
    for vocab in (0, VOCAB):
        ids = tokenizer(kind).encode(text, special=False)
        pieces = pieces_of(TextStream(vocab=vocab), ids, tokenizer(kind).decode)
        assert "".join(pieces) == text
        assert "\ufffd" not in "".join(pieces)


def test_a_piece_is_given_as_soon_as_it_is_whole() -> None:
    ids = tokenizer("olmoe").encode("a🎉b", special=False)
    shown = pieces_of(TextStream(vocab=VOCAB), ids, tokenizer("olmoe").decode)
    whole = [text for text in shown if text]
    assert whole == ["a", "🎉", "b"]
    assert shown[-1] == ""


def test_bytes_are_given_when_an_id_follows_that_is_no_byte() -> None:
    newline, letter = tokenizer("mixtral").encode("\nb", special=False)[-2:]
    stream = TextStream(vocab=VOCAB)
    decode = tokenizer("mixtral").decode
    shown = []
    for id_ in (letter, newline, letter):
        stream.push(id_)
        shown.append(stream.take(decode(stream.windows())))
    assert shown == ["b", "", "\nb"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "ids",
    [
        [1] * 400,
        list(range(3, 259)) * 2,
        [3 + 0xFF] * 400,
        [3 + 0xE4] * 400,
        [3 + byte for byte in "🎉你".encode() * 60],
        [434] * 400,
    ],
    ids=["special", "bytes", "invalid", "beginnings", "characters", "spaces"],
)
@pytest.mark.parametrize("vocab", [0, VOCAB])
def test_windows_do_not_grow_with_the_answer(kind: str, ids: list[int], vocab: int) -> None:
    longest = 0

    def decode(windows: Sequence[Sequence[int]]) -> list[str]:
        nonlocal longest
        longest = max(longest, *map(len, windows))
        return tokenizer(kind).decode(windows)

    pieces = pieces_of(TextStream(vocab=vocab), ids, decode)
    assert longest <= 80
    assert len("".join(pieces[:-1])) >= len(tokenizer(kind).decode([ids])[0]) - 40


def test_ids_that_come_while_a_decoding_is_under_way_wait_for_the_next() -> None:
    ids = tokenizer("mixtral").encode("to be 🎉 or not", special=False)
    decode = tokenizer("mixtral").decode
    stream = TextStream(vocab=VOCAB)
    shown = ""
    stream.push(ids[0])
    for id_ in [*ids[1:], None]:
        texts = decode(stream.windows())
        if id_ is not None:
            stream.push(id_)
        shown += stream.take(texts)
    assert shown + stream.finish() == "to be 🎉 or not"


def test_what_is_left_incomplete_is_given_at_the_end() -> None:
    ids = tokenizer("olmoe").encode("a🎉", special=False)[:-1]
    pieces = pieces_of(TextStream(), ids, tokenizer("olmoe").decode)
    assert pieces[-1]
    assert "".join(pieces) == tokenizer("olmoe").decode([ids])[0]


# Stop strings.


def test_the_beginning_of_a_stop_string_is_held_back() -> None:
    stops = StopStrings(["\n\nUser:"])
    assert stops.feed("Hello\n\nUs") == "Hello"
    assert stops.feed("a") == "\n\nUsa"
    assert stops.feed(" b\n\nUser") == " b"
    assert not stops.stopped
    assert stops.feed(": more") == ""
    assert (stops.stopped, stops.matched) == (True, "\n\nUser:")
    assert stops.feed("and more") == stops.finish() == ""


def test_the_match_that_starts_first_wins() -> None:
    stops = StopStrings(["c", "bcd"])
    assert stops.feed("abc") == "a"
    assert not stops.stopped
    assert stops.feed("d") == ""
    assert (stops.stopped, stops.matched) == (True, "bcd")
    stops = StopStrings(["c", "bcd"])
    assert stops.feed("abcx") == "ab"
    assert stops.matched == "c"
    stops = StopStrings(["c", "bcd"])
    assert stops.feed("abc") + stops.finish() == "ab"
    assert (stops.stopped, stops.matched) == (True, "c")


@given(
    text=st.text("ab", max_size=60), stops=st.lists(st.text("ab", min_size=1, max_size=6), max_size=5), groups=GROUPS
)
@settings(max_examples=400, deadline=None)
def test_stop_strings_cut_like_find(text: str, stops: list[str], groups: list[int]) -> None:
    search = StopStrings(stops)
    shown, at = "", 0
    while at < len(text):
        size = groups[at % len(groups)]
        shown += search.feed(text[at : at + size])
        at += size
    assert (shown + search.finish(), search.matched) == cut(text, stops)


def test_a_long_text_of_near_matches_takes_linear_work() -> None:
    steps = 0

    class Counting(StopStrings):
        def _step(self, fail: list[int], state: int, character: str) -> int:
            nonlocal steps
            steps += 1
            return super()._step(fail, state, character)

    search = Counting(["a" * index + "b" for index in range(240, 256)])
    steps = 0
    shown = "".join(search.feed("a") for _ in range(20_000))
    assert steps == 20_000
    assert shown + search.finish() == "a" * 20_000


@pytest.mark.parametrize(
    ("stops", "field"),
    [(["x"] * 17, "stop"), (["a", ""], "stop[1]"), (["é" * 129], "stop[0]"), ([str(n) for n in range(10**6)], "stop")],
)
def test_stop_strings_have_bounds(stops: list[str], field: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        TextStream(stops)
    assert caught.value.field == field


def test_stop_strings_at_their_bounds_are_taken() -> None:
    stream = TextStream(["é" * 127 + format(index, "02") for index in range(16)])
    assert not stream.stopped
