from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertmesh.errors import SetupError
from expertmesh.rpc.settings import ModelSettings, Settings, read_settings, setting, to_arguments


@dataclass(frozen=True)
class Sample(ModelSettings):
    texts: int = setting("a number", 8)
    inspect: bool = setting("a switch", False)
    checks: bool = setting("a switch that is on", True)


@dataclass(frozen=True, kw_only=True)
class Demanding(Settings):
    mesh: Path = setting("has no default")


def read(*arguments: str, **environment: str) -> Sample:
    return read_settings(Sample, "sample", arguments, environment)


def config(folder: Path, text: str) -> str:
    path = folder / "settings.toml"
    path.write_text(text)
    return f"--config={path}"


def test_defaults() -> None:
    assert read() == Sample()
    assert read().listen.startswith("127.0.0.1:")


def test_flag_over_environment_over_file_over_default(tmp_path: Path) -> None:
    file = config(tmp_path, "texts = 1\nthreads = 1\nlog_level = 'error'\nmodel = 'from-file'\n")
    given = {"EXPERTMESH_TEXTS": "2", "EXPERTMESH_THREADS": "2", "EXPERTMESH_LOG_LEVEL": "warning"}
    settings = read(file, "--texts", "3", "--threads=3", **given)
    assert (settings.texts, settings.threads) == (3, 3)
    assert settings.log_level == "warning"
    assert settings.model == Path("from-file")
    assert settings.grace_s == Sample.grace_s


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    path = config(tmp_path, "texts = 5").removeprefix("--config=")
    assert read(EXPERTMESH_CONFIG=path).texts == 5


def test_variables_of_others_are_left_alone() -> None:
    assert read(TEXTS="9", EXPERTMESH_UNKNOWN="9") == Sample()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], False),
        (["--inspect"], True),
        (["--inspect", "true"], True),
        (["--inspect=ON"], True),
        (["--inspect=0"], False),
        (["--inspect=no"], False),
    ],
)
def test_switches(arguments: list[str], expected: bool) -> None:
    assert read(*arguments).inspect is expected


def test_a_switch_can_be_turned_off_again(tmp_path: Path) -> None:
    assert read("--checks=off").checks is False
    assert read(EXPERTMESH_CHECKS="false").checks is False
    assert read(config(tmp_path, "checks = false")).checks is False
    assert read(config(tmp_path, "checks = false"), "--checks").checks is True


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--texts=many"], "texts = 'many' is no int"),
        (["--texts=1.5"], "texts = '1.5' is no int"),
        (["--inspect=maybe"], "inspect = 'maybe' is no bool"),
        (["--grace-s=soon"], "--grace-s = 'soon' is no float"),
        (["--grace-s=-1"], "grace_s must be in"),
        (["--grace-s=nan"], "grace_s must be in"),
        (["--drain-s=inf"], "drain_s must be in"),
        (["--threads=0"], "threads must be in"),
        (["--threads=-1"], "threads must be in"),
        (["--log-level=loud"], "log_level 'loud' is not known"),
        (["--max-message-bytes=1"], "max_message_bytes must be in"),
        (["--max-message-bytes=2147483648"], "max_message_bytes must be in"),
        (["--listen=localhost"], "listen 'localhost' is not HOST:PORT"),
        (["--listen=:50051"], "is not HOST:PORT"),
        (["--listen=localhost:65536"], "is not HOST:PORT"),
        (["--listen=localhost:http"], "is not HOST:PORT"),
        (["--listen=unix:"], "unix socket's path"),
        ([f"--listen=unix:/{'x' * 107}"], "unix socket's path"),
        (["--metrics=9090"], "metrics '9090' is not HOST:PORT"),
        (["--config=/nowhere/settings.toml"], "settings file /nowhere/settings.toml cannot be read"),
    ],
)
def test_a_bad_value_gives_one_line(arguments: list[str], reason: str) -> None:
    with pytest.raises(SetupError) as caught:
        read(*arguments)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("texts = 'x'", "texts = 'x' is no int"),
        ("texts = [1]", "texts = [1] is no int"),
        ("texts = 1.7", "texts = 1.7 is no int"),
        ("inspect = 2", "inspect = 2 is no bool"),
        ("text = 1\nport = 2", "unknown keys: port, text"),
        ("texts = ", "cannot be read"),
    ],
)
def test_a_bad_file_gives_one_line(tmp_path: Path, text: str, reason: str) -> None:
    with pytest.raises(SetupError) as caught:
        read(config(tmp_path, text))
    assert reason in str(caught.value)


def test_a_binary_file_gives_one_line(tmp_path: Path) -> None:
    (tmp_path / "settings.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(SetupError, match="cannot be read"):
        read(f"--config={tmp_path / 'settings.toml'}")


def test_a_bad_variable_gives_one_line() -> None:
    with pytest.raises(SetupError, match="EXPERTMESH_THREADS = 'all' is no int"):
        read(EXPERTMESH_THREADS="all")


def test_a_setting_without_default_is_asked_for() -> None:
    with pytest.raises(SetupError, match="--mesh is needed"):
        read_settings(Demanding, "demanding", [], {})
    assert read_settings(Demanding, "demanding", [], {"EXPERTMESH_MESH": "m.toml"}).mesh == Path("m.toml")


@pytest.mark.parametrize("flag", ["--text=1", "--unknown", "--threads"])
def test_a_flag_that_is_not_known_ends_with_status_2(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read(flag)
    assert caught.value.code == 2
    assert "python -m services.sample" in capsys.readouterr().err


def test_help_names_every_setting_and_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for flag in ("--listen", "--grace-s", "--model", "--device", "--texts", "--inspect"):
        assert flag in shown
    assert "(default: 8)" in shown


@pytest.mark.parametrize("address", ["unix:relative.sock", f"unix:/{'x' * 101}", "[::1]:0", "0.0.0.0:65535", "a-b.c:1"])
def test_addresses_that_can_be_listened_on(address: str) -> None:
    assert read(f"--listen={address}").listen == address


@given(
    texts=st.integers(),
    inspect=st.booleans(),
    checks=st.booleans(),
    threads=st.integers(1, 1024),
    grace_s=st.floats(0, 3600),
    name=st.text(st.characters(codec="utf-8", exclude_characters="\0")),
    model=st.sampled_from([Path("a b"), Path("/x/-y"), Path("models/agnews")]),
)
def test_arguments_give_the_same_settings_again(**values: object) -> None:
    settings = Sample(**values)
    assert read_settings(Sample, "sample", to_arguments(settings), {}) == settings


def test_defaults_need_no_arguments() -> None:
    assert to_arguments(Sample()) == []
