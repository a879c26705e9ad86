from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from tests.up import Up, run

HELD_OUT_ROWS = 40


def test_help_lists_every_verb() -> None:
    ended = run("--help")
    assert ended.returncode == 0
    for verb in ("up", "down", "status", "classify", "verify", "eval", "train", "split"):
        assert verb in ended.stdout


def test_an_unknown_verb_is_refused() -> None:
    assert run("clasify").returncode == 2


def test_classify_prints_one_object_a_line_through_either_route(mesh: Up, headlines: list[str], tmp_path: Path) -> None:
    file = tmp_path / "headlines.txt"
    file.write_text("\n".join(headlines))
    answers = {}
    for route in ("mesh", "full-model"):
        ended = run("classify", "--address", mesh.grpc, "--file", file, "--json", "--route", route)
        assert ended.returncode == 0, ended.stderr
        answers[route] = [json.loads(line) for line in ended.stdout.splitlines()]
        assert [answer["text"] for answer in answers[route]] == headlines
        assert {answer["route"] for answer in answers[route]} == {route}
    for one, two in zip(*answers.values(), strict=True):
        assert one["probabilities"] == two["probabilities"]
        assert one["label"] == max(one["probabilities"], key=one["probabilities"].get)


def test_classify_answers_the_good_lines_and_names_the_bad_ones(mesh: Up, tmp_path: Path) -> None:
    file = tmp_path / "mixed.txt"
    long = b"x" * (64 * 1024 + 1)
    file.write_bytes(
        b"Striker scores twice\n\n \t \nbad \xff\xfe bytes\n" + long + b"\nBank cuts rates\n" + b"<b></b>\n"
    )
    ended = run("classify", "--address", mesh.grpc, "--file", file, "--json")
    answers = [json.loads(line) for line in ended.stdout.splitlines()]
    assert ended.returncode == 1
    assert [answer.get("error", "") for answer in answers[1:5]] == [
        "the text is empty",
        "the text is empty",
        "the text is not UTF-8",
        "the text has more than 65536 bytes",
    ]
    assert "label" in answers[0]
    assert "label" in answers[5]
    assert "Traceback" not in ended.stderr


def test_classify_shows_a_table_to_people(mesh: Up) -> None:
    ended = run("classify", "--address", mesh.grpc, "Striker scores twice in cup final", "goal " * 300)
    assert ended.returncode == 0
    assert "Sports" in ended.stdout
    assert "(truncated)" in ended.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give texts, or --file"),
        (["--file", "nowhere.txt"], "cannot be read"),
        (["--route", "sideways", "text"], "route 'sideways' is not known"),
        (["--address", "127.0.0.1:1", "text"], "does not answer"),
    ],
)
def test_classify_has_one_clear_error(arguments: list[str], said: str) -> None:
    ended = run("classify", *arguments)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_classify_without_a_mesh_starts_one_and_stops_it(model: Path, tmp_path: Path) -> None:
    ended = run("classify", "--run-dir", tmp_path, "--model", model, "--json", "Bank cuts rates to help growth")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout)["route"] == "mesh"


def test_eval_measures_accuracy_and_confusions(mesh: Up, tmp_path: Path, headlines: list[str], model: Path) -> None:
    data = tmp_path / "test.csv"
    labels = ["World", "Sports", "Business", "Sci/Tech"]
    lines = run("classify", "--address", mesh.grpc, "--json", *headlines).stdout.splitlines()
    given = [labels.index(json.loads(line)["label"]) for line in lines]
    with data.open("w", newline="") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL)
        for row, (text, label) in enumerate(zip(headlines, given, strict=True)):
            wrong = (label + 1) % 4 if row < 7 else label
            writer.writerow([wrong + 1, "", text])
    ended = run("eval", model, "--data", data, "--address", mesh.grpc)
    assert ended.returncode == 0, ended.stderr
    assert "rows      28" in ended.stdout
    assert "accuracy  75.00%" in ended.stdout
    assert "confusions" in ended.stdout
    assert "tokens, in fair shares" in ended.stdout


def test_eval_and_verify_refuse_a_mesh_of_another_model(mesh: Up, model: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(model, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["spec"]["context"] = 64
    (other / "manifest.json").write_text(json.dumps(manifest))
    data = tmp_path / "one.csv"
    data.write_text("1,a,b\n")
    for arguments in (["verify", other, "--record"], ["eval", other, "--data", data]):
        ended = run(*arguments, "--address", mesh.grpc)
        assert ended.returncode == 2
        assert "serves another model" in ended.stderr
    assert json.loads((other / "manifest.json").read_text()) == manifest


def test_texts_are_shown_as_they_are(mesh: Up) -> None:
    ended = run("classify", "--address", mesh.grpc, "[red]oil[/red] [/] [Reuters] [b]prices[/b]")
    assert ended.returncode == 0, ended.stderr
    assert "[red]oil[/red] [/] [Reuters] [b]prices[/b]" in ended.stdout


def test_version() -> None:
    assert run("--version").stdout.startswith("expertmesh 0.")


def test_demo_shows_both_routes_and_that_they_are_bit_equal(model: Path, tmp_path: Path, headlines: list[str]) -> None:
    file = tmp_path / "few.txt"
    file.write_text("\n".join(headlines[:3]))
    ended = run("demo", model, "--file", file)
    assert ended.returncode == 0, ended.stderr
    assert "14 processes are up" in ended.stdout
    assert "both routes were bit-equal on all 3 texts" in ended.stdout
    assert ended.stdout.count("full-model") == 3


def test_split_of_the_bundled_model_gives_the_same_bytes_twice(model: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        ended = run("split", model, tmp_path / name)
        assert ended.returncode == 0, ended.stderr
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
