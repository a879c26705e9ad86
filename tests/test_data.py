import hashlib
import lzma

import pytest

from expertmesh.errors import SetupError
from expertmesh.train.data import Row, description_key, is_heldout, read_rows, split
from expertmesh.train.texts import lines_of, read_text, read_texts

STORY = "Oil prices rose past {} dollars a barrel on Friday, said the minister of a country that exports a lot of it."


def stories(heldout, count=3):
    return [text for text in (STORY.format(n) for n in range(2000)) if is_heldout(description_key(text)) == heldout][
        :count
    ]


def test_the_official_layout_has_no_header_and_counts_classes_from_one(tmp_path):
    path = tmp_path / "train.csv"
    path.write_text('"3","Title, with comma","Text ""quoted"""\n"1","Other","More\\\\text"\n', encoding="utf-8")
    rows = read_rows(path, 4)
    assert [(row.label, row.title, row.kind) for row in rows] == [
        (2, "Title, with comma", "title+description"),
        (0, "Other", "title+description"),
    ]
    assert rows[0].text == 'Title, with comma Text "quoted"'


def test_a_header_names_the_columns_and_xz_is_unpacked(tmp_path):
    path = tmp_path / "union.csv.xz"
    text = "class_index,title,description,kind,altered,source\n2,,both in one,merged,1,x\n"
    path.write_bytes(lzma.compress(text.encode()))
    assert read_rows(path, 4) == [Row(1, "", "both in one", "merged", True)]


@pytest.mark.parametrize("line", ["5,a,b", "0,a,b", "x,a,b", "1,a"])
def test_a_bad_row_is_named_by_its_line(tmp_path, line):
    path = tmp_path / "train.csv"
    path.write_text(f"1,fine,fine\n{line}\n", encoding="utf-8")
    with pytest.raises(SetupError, match="line 2"):
        read_rows(path, 4)


def test_a_missing_or_damaged_file_is_a_setup_error(tmp_path):
    with pytest.raises(SetupError):
        read_rows(tmp_path / "none.csv", 4)
    (tmp_path / "bad.csv.xz").write_bytes(b"no xz")
    with pytest.raises(SetupError):
        read_rows(tmp_path / "bad.csv.xz", 4)


def test_copies_have_one_key():
    original = "Apple #39;s  quot;iPod quot; &lt;b&gt;sells&lt;/b&gt; well, U.S. says"
    assert description_key(original) == "applesipodsellswellussays"
    for copy in (
        original.lower(),
        "apple 's `` ipod '' sells well , u . s . says",
        'Apple\'s "iPod" sells well, US says',
    ):
        assert description_key(copy) == description_key(original)


def test_heldout_is_sha1_modulo_20():
    keys = [description_key(STORY.format(n)) for n in range(400)]
    expected = [int(hashlib.sha1(key.encode()).hexdigest(), 16) % 20 == 0 for key in keys]
    assert [is_heldout(key) for key in keys] == expected
    assert 5 < sum(expected) < 45


def test_of_duplicates_the_fullest_row_stays():
    text = stories(heldout=False, count=1)[0]
    rows = [Row(0, "", text.lower(), "description", altered=True), Row(0, "", text, "description"), Row(0, "T", text)]
    parts = split(rows)
    assert [row.title for row in parts.training] == ["T"]
    assert parts.duplicates == 2


def test_the_order_of_rows_does_not_change_what_is_held_out():
    rows = [Row(n % 4, "T", STORY.format(n)) for n in range(300)]
    forward, backward = split(rows), split(rows[::-1])
    assert {row.key for row in forward.heldout} == {row.key for row in backward.heldout} != set()
    assert forward == split(rows)


def test_a_merged_row_is_held_out_with_the_description_it_ends_with():
    text = stories(heldout=True, count=1)[0]
    parts = split([Row(0, "", text, "description"), Row(0, "", f"Some title {text}", "merged")])
    assert [row.kind for row in parts.heldout] == ["merged"]
    assert parts.training == []


@pytest.mark.parametrize(
    "copy",
    [
        lambda text: text.upper(),
        lambda text: text.replace(" ", " , "),
        lambda text: text + " More follows, which the other source had cut off.",
        lambda text: "NEW YORK - " + text,
        lambda text: text[:90],
    ],
)
@pytest.mark.parametrize("kind", ["title+description", "description", "merged"])
def test_no_copy_of_a_heldout_row_is_trained_on(copy, kind):
    for text in stories(heldout=True):
        fine = Row(1, "Fine", "Quite another story of a football match that ended without a goal for either side.")
        parts = split([fine, Row(0, "Title", text), Row(0, "", copy(text), kind)])
        assert [row.title for row in parts.training] == ["Fine"]


@pytest.mark.parametrize("header", ["class_index,title,description", "Class Index,Title,Description"])
def test_a_header_may_be_written_as_others_write_it(tmp_path, header):
    path = tmp_path / "train.csv"
    path.write_text(f'{header}\n"2",Title,Text\n', encoding="utf-8-sig")
    assert [(row.label, row.title, row.description) for row in read_rows(path, 4)] == [(1, "Title", "Text")]


def test_the_last_tenth_of_the_first_text_is_held_out(tmp_path):
    first, second = tmp_path / "first.txt", tmp_path / "second.txt"
    first.write_text("ä123456789" * 2, encoding="utf-8")
    second.write_text("all of it\n")
    texts = read_texts([first, second])
    assert texts.main == "ä123456789ä1234567"
    assert texts.heldout == "89"
    assert texts.others == ("all of it\n",)


def test_wikitext_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "wiki.tokens"
    path.write_text(
        " \n = Title = \n \n The \" well @-@ known \" cat ( of 1 @,@ 000 ) <unk> did n't , it 's said , run .  \n",
        encoding="utf-8",
    )
    assert read_text(path) == "= Title =\n\nThe \"well-known\" cat (of 1,000) didn't, it's said, run.\n"


def test_lines_of_a_text_are_the_text():
    text = "ROMEO:\nSpeak.\n\n\nJULIET:\nGo"
    assert lines_of(text) == ["ROMEO:\n", "Speak.\n\n\n", "JULIET:\n", "Go"]


def test_a_text_that_is_missing_or_no_text_or_too_short_is_a_setup_error(tmp_path):
    with pytest.raises(SetupError, match=r"none\.txt: cannot be read"):
        read_texts([tmp_path / "none.txt"])
    (tmp_path / "binary.txt").write_bytes(b"good\xff")
    with pytest.raises(SetupError, match=r"not UTF-8.*byte 4"):
        read_texts([tmp_path / "binary.txt"])
    (tmp_path / "short.txt").write_text("")
    with pytest.raises(SetupError, match="too short"):
        read_texts([tmp_path / "short.txt"])
