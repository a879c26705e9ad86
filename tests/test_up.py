from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
from pathlib import Path

import pytest

from expertmesh.local.state import is_held
from tests.up import COMMAND, Up, exists, run, wait_until

KINDS = {"tokenizer", "embedding", "gating", "expert", "classifier", "full_model", "gateway"}


def test_up_starts_fourteen_processes_and_status_tells_of_them(model: Path, headlines: list[str]) -> None:
    with Up(model) as up:
        assert len(up.processes()) == 14
        assert "ready: 14 processes" in up.lines[-1]
        assert run("classify", "--run-dir", up.run_dir, *headlines).returncode == 0
        status = json.loads(run("status", "--run-dir", up.run_dir, "--json").stdout)
        assert {process["kind"] for process in status["processes"]} == KINDS
        assert {process["health"] for process in status["processes"]} == {"serving"}
        experts = [process for process in status["processes"] if process["kind"] == "expert"]
        assert all(set(process["expert_tokens"]) <= {f"0:{i}", f"1:{i}"} for i, process in enumerate(experts))
        assert sum(sum(process["expert_tokens"].values()) for process in experts) > 0
        shown = run("status", "--run-dir", up.run_dir)
        assert "expert-7.0" in shown.stdout
        assert "share of expert tokens" in shown.stdout

        pids = up.all_pids()
        stopped = run("down", "--run-dir", up.run_dir)
        assert stopped.stdout == "stopped 14 processes\n"
        wait_until(lambda: not any(map(exists, pids)), 3)
        assert run("status", "--run-dir", up.run_dir).returncode == 2
        assert run("down", "--run-dir", up.run_dir).returncode == 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_however_up_ends_no_process_of_it_is_left(model: Path, number: signal.Signals) -> None:
    with Up(model, "--expert-services", "1", "--no-full-model") as up:
        pids = up.all_pids()
        assert len(pids) == 8
        os.kill(up.process.pid, number)
        wait_until(lambda: not any(map(exists, pids)), 3 if number == signal.SIGKILL else 15)


def test_a_killed_nursery_takes_its_services_along_and_ends_up_with_an_error(model: Path) -> None:
    with Up(model, "--expert-services", "1", "--no-full-model") as up:
        pids = up.all_pids()
        nursery = int(Path(f"/proc/{up.process.pid}/task/{up.process.pid}/children").read_text().split()[0])
        os.kill(nursery, signal.SIGKILL)
        wait_until(lambda: not any(map(exists, pids)), 15)
        assert up.process.wait() == 2


def test_a_second_mesh_in_the_same_folder_is_refused(model: Path, mesh: Up) -> None:
    ended = run("up", model, "--run-dir", mesh.run_dir)
    assert ended.returncode == 2
    assert "is running" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_port_in_use_is_one_clear_error(model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        for option, other in (("--grpc", "--http"), ("--http", "--grpc")):
            ended = run("up", model, "--run-dir", tmp_path / "run", option, address, other, "127.0.0.1:0")
            assert (ended.returncode, ended.stdout) == (2, "")
            assert ended.stderr.startswith(f"error: {option} {address}: Address already in use")
            assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--replicas", "expert-9=2"], "no service 'expert-9'"),
        (["--replicas", "expert=0"], "1 to 64 replicas"),
        (["--replicas", "expert"], "not NAME=VALUE"),
        (["--replicas", "gateway=65"], "1 to 64 replicas"),
        (["--expert-services", "9"], "cannot be spread over 9"),
        (["--grpc", "nowhere"], "is not HOST:PORT"),
        (["--device", "gateway=cpu"], "gateway computes nothing"),
        (["--run-dir", "TMP/" + "x" * 120], "too long"),
        (["--run-dir", "/dev/null"], "cannot be made"),
    ],
)
def test_bad_options_are_one_clear_error(model: Path, tmp_path: Path, options: list[str], said: str) -> None:
    told = [option.replace("TMP", str(tmp_path)) for option in options]
    ended = run("up", model, "--run-dir", tmp_path / "run", "--grpc=127.0.0.1:0", "--http=127.0.0.1:0", *told)
    assert ended.returncode == 2
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


def test_missing_and_damaged_models_are_one_clear_error(model: Path, tmp_path: Path) -> None:
    for folder, said in ((tmp_path / "nowhere", "there is no model folder"), (tmp_path, "holds no manifest.json")):
        ended = run("up", folder, "--run-dir", tmp_path / "run")
        assert ended.returncode == 2
        assert said in ended.stderr
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "gating" / "layer-01.safetensors").unlink()
    ended = run("up", broken, "--run-dir", tmp_path / "run", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0")
    assert ended.returncode == 2
    whoever_sees_it_first = ("gating.0", "full_model.0")
    assert any(f"{name} could not start" in ended.stderr for name in whoever_sees_it_first)
    assert "part gating/layer-01" in ended.stderr


def test_a_device_that_is_not_there_is_named(model: Path, tmp_path: Path) -> None:
    ended = run("up", model, "--run-dir", tmp_path / "run", "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0",
                "--device", "expert-2=cuda:9")  # fmt: skip
    assert ended.returncode == 2
    assert "expert-2.0 could not start" in ended.stderr
    assert "device 'cuda:9' is not there" in ended.stderr


def test_a_hangup_does_not_end_what_nohup_started(model: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what a child inherits from nohup
    try:
        with Up(model, "--expert-services", "1", "--no-full-model") as up:
            os.kill(up.process.pid, signal.SIGHUP)
            assert run("status", "--run-dir", up.run_dir).returncode == 0
            assert up.process.poll() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stopped_start_leaves_nothing(model: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "up", str(model), "--run-dir", str(tmp_path / "r"), "--grpc=127.0.0.1:0", "--http=127.0.0.1:0"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: children.read_text().split(), 20)
    nursery = int(children.read_text().split()[0])
    process.send_signal(signal.SIGINT)
    process.wait(timeout=20)
    wait_until(lambda: not exists(nursery), 3)


def test_down_ends_a_mesh_that_is_still_starting(model: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "r"
    with subprocess.Popen(
        [*COMMAND, "up", str(model), "--run-dir", str(run_dir), "--grpc=127.0.0.1:0", "--http=127.0.0.1:0"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as starting:  # fmt: skip
        wait_until(lambda: is_held(run_dir), 20)
        starting_files = set(run_dir.iterdir())
        ended = run("down", "--run-dir", run_dir)
        assert ended.returncode == 0, ended.stderr
        assert run_dir / "up.json" not in starting_files
        assert ended.stdout == "stopped a mesh that was starting\n"
        assert starting.wait(timeout=20) == 0
    assert not is_held(run_dir)


def test_the_folder_of_another_user_is_not_believed(tmp_path: Path) -> None:
    if os.getuid() != 0:
        pytest.skip("only root can make a folder of another user")
    with subprocess.Popen(["sleep", "60"]) as bystander:
        folder = tmp_path / "theirs"
        folder.mkdir()
        state = {"pid": bystander.pid, "model": "", "grpc": "", "http": "", "processes": {}}
        (folder / "up.json").write_text(json.dumps(state))
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.chown(folder, 65534, 65534)
        assert run("down", "--run-dir", folder).returncode == 1
        assert bystander.poll() is None
        os.close(lock)
        bystander.kill()


def test_a_half_sent_body_does_not_hold_up_the_stop(model: Path) -> None:
    with Up(model, "--expert-services", "1", "--no-full-model") as up:
        host, port = up.http.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(b"POST /api/v1/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert run("down", "--run-dir", up.run_dir).returncode == 0
        assert '"event": "stopped"' in (up.run_dir / "logs" / "gateway.0.log").read_text()
        assert not (up.run_dir / "up.json").exists()
