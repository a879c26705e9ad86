from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from expertmesh.errors import Unavailable, WrongPart
from expertmesh.v1 import inference_pb2 as pb
from tests.doubles.scripted import PROFILE, Scripted, said
from tests.up import COMMAND, Up, run

STOP, LENGTH = pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH
TWO = (
    said("x", choice=1, ids=[2]),
    said("a\n", choice=0, ids=[1]),
    said("y", choice=1, ids=[3], finish=STOP),
    said("b", choice=0, ids=[4], finish=LENGTH),
    said(usage=pb.Usage(prompt_tokens=1, completion_tokens=4)),
)


@asynccontextmanager
async def started(double: Scripted, *arguments: object) -> AsyncIterator[asyncio.subprocess.Process]:
    async with double.served() as address:
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "generate", *map(str, arguments), "--address", address,
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            yield process
        finally:
            if process.returncode is None:
                process.kill()
            await process.communicate()


async def generate(double: Scripted, *arguments: object, stdin: bytes = b"") -> tuple[int | None, str, str]:
    """Runs the verb to its end; gives status, stdout and stderr."""
    async with started(double, *arguments) as process:
        stdout, stderr = await asyncio.wait_for(process.communicate(stdin), 60)
    return process.returncode, stdout.decode(), stderr.decode()


async def test_text_on_stdout_and_one_line_about_it_on_stderr() -> None:
    status, stdout, stderr = await generate(Scripted(), "ROMEO:")
    assert (status, stdout) == (0, "Hello!\n")
    (line,) = stderr.splitlines()
    assert line.startswith("4 tokens in ")
    assert line.endswith("tokens/s), mesh, exact, seed 7, finish: stop")


async def test_options_arrive_as_the_contract_has_them() -> None:
    double = Scripted(*[said("a", choice=choice, finish=STOP) for choice in range(3)])
    await generate(
        double, "Once", "upon", "--max-tokens", 9, "--temperature", 0.5, "--top-k", 4, "--top-p", 0.25,
        "--min-p", 0.125, "--repetition-penalty", 1.5, "--seed", 2**64 - 1, "--stop", "END", "--stop", "\n", "--n", 3,
        "--route", "full-model", "--contract", "degraded-ok",
    )  # fmt: skip
    assert double.requests == [
        pb.GenerateRequest(
            text="Once upon",
            max_tokens=9,
            temperature=0.5,
            top_k=4,
            top_p=0.25,
            min_p=0.125,
            repetition_penalty=1.5,
            seed=2**64 - 1,
            stop=["END", "\n"],
            n=3,
            route=pb.ROUTE_FULL_MODEL,
            contract=pb.CONTRACT_DEGRADED_OK,
        )
    ]


async def test_a_prompt_from_stdin_and_one_for_a_chat() -> None:
    double = Scripted()
    await generate(double, "-", stdin="ROMEO:\né".encode())
    await generate(double, "--chat", "Hi")
    assert double.requests[0].text == "ROMEO:\né"
    assert not double.requests[0].HasField("seed")
    assert [(message.role, message.content) for message in double.requests[1].chat.messages] == [("user", "Hi")]


async def test_choices_are_shown_one_after_another() -> None:
    status, stdout, stderr = await generate(Scripted(*TWO), "--n", 2, "Say")
    assert (status, stdout) == (0, "a\nb\n---\nxy\n")
    assert stderr.startswith("4 tokens in ")
    assert stderr.endswith("finish: length, stop\n")


async def test_json_has_one_object_for_each_choice() -> None:
    status, stdout, _ = await generate(Scripted(*TWO), "--n", 2, "--json", "Say")
    assert status == 0
    told = {"route": "mesh", "exact": True, "profile": PROFILE, "seed": 7}
    assert [json.loads(line) for line in stdout.splitlines()] == [
        {"choice": 0, "text": "a\nb", "ids": [1, 4], "finish_reason": "length"} | told,
        {"choice": 1, "text": "xy", "ids": [2, 3], "finish_reason": "stop"} | told,
    ]


async def test_experts_that_were_missing_are_told() -> None:
    missing = [pb.ExpertId(layer=1, expert=3)]
    last = said("b", ids=[2], finish=STOP, route=pb.ROUTE_DEGRADED, exact=False, missing_experts=missing)
    told = await generate(Scripted(said("a", ids=[1]), last), "--json", "--contract", "degraded-ok", "Say")
    assert json.loads(told[1])["missing_experts"] == [{"layer": 1, "expert": 3}]
    _, _, stderr = await generate(Scripted(said("a", ids=[1]), last), "--contract", "degraded-ok", "Say")
    assert "degraded, not exact, without expert 3 of layer 1, seed 7" in stderr


async def test_text_is_shown_as_it_comes() -> None:
    gate = asyncio.Event()
    async with started(Scripted(said("Hel", ids=[1]), gate, said("lo", finish=STOP)), "Say") as process:
        assert process.stdout is not None
        assert await asyncio.wait_for(process.stdout.read(100), 60) == b"Hel"
        gate.set()
        assert await process.stdout.read() == b"lo\n"
        assert await process.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_frees_the_sequence(number: int) -> None:
    double = Scripted(said("Hel", ids=[1]), asyncio.Event())
    async with started(double, "Say") as process:
        assert process.stdout is not None
        await asyncio.wait_for(process.stdout.read(100), 60)
        process.send_signal(number)
        await asyncio.wait_for(double.closed.wait(), 20)
        _, stderr = await process.communicate()
    assert process.returncode == 130
    assert b"Traceback" not in stderr


async def test_a_reader_that_has_read_enough_ends_it_quietly() -> None:
    forever = asyncio.Event()
    double = Scripted(*[said("x" * 1000, ids=[1])] * 500, forever)
    async with double.served() as address:
        reading, writing = os.pipe()
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "generate", "Say", "--address", address, stdout=writing, stderr=asyncio.subprocess.PIPE
        )
        os.close(writing)
        assert await asyncio.to_thread(os.read, reading, 10) == b"x" * 10
        os.close(reading)
        _, stderr = await asyncio.wait_for(process.communicate(), 30)
        await asyncio.wait_for(double.closed.wait(), 20)
    assert (process.returncode, stderr) == (0, b"")


async def test_controls_are_kept_from_terminals_only() -> None:
    bad = "\x1b]0;title\x07ok\n"
    double = Scripted(said(bad, ids=[1], finish=STOP))
    assert (await generate(double, "Say"))[1] == bad
    async with double.served() as address:
        terminal, other = os.openpty()
        process = await asyncio.create_subprocess_exec(
            *COMMAND, "generate", "Say", "--address", address, stdout=other, stderr=asyncio.subprocess.PIPE
        )
        os.close(other)
        shown = await asyncio.wait_for(asyncio.to_thread(os.read, terminal, 1000), 60)
        await process.communicate()
        os.close(terminal)
    assert shown.decode() == "\ufffd]0;title\ufffdok\r\n"


@pytest.mark.parametrize(
    ("steps", "arguments", "said_of_it"),
    [
        ([WrongPart("this model classifies")], ["Say"], "the model cannot do this: this model classifies"),
        ([Unavailable("no gating", "gating")], ["Say"], "the mesh could not answer: no gating"),
        ([said("a", ids=[1])], ["Say"], "the mesh could not answer: the answer ended before it was finished"),
        ([said("a", choice=5)], ["Say"], "choice 5"),
        ([], ["--route", "sideways", "Say"], "route 'sideways' is not known"),
        ([], ["--contract", "none", "Say"], "contract 'none' is not known"),
        ([], [b"\xff\xfe".decode(errors="surrogateescape")], "the prompt is not UTF-8"),
    ],
)
async def test_one_clear_error(steps: list[Any], arguments: list[str], said_of_it: str) -> None:
    status, _, stderr = await generate(Scripted(*steps), *arguments)
    assert status == 2
    (line,) = stderr.splitlines()
    assert line.startswith("error: ")
    assert said_of_it in line


@pytest.mark.parametrize("arguments", [[], ["--temperature", "-1", "a"], ["--n", "17", "a"], ["--seed", "-1", "a"]])
def test_bad_usage(arguments: list[str]) -> None:
    ended = run("generate", *arguments)
    assert ended.returncode == 2
    assert "Traceback" not in ended.stderr


def test_nobody_at_the_address() -> None:
    ended = run("generate", "--address", "127.0.0.1:1", "Say")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "the mesh could not answer: " in ended.stderr


def test_a_model_that_classifies_cannot_generate(mesh: Up, model: Path) -> None:
    ended = run("generate", "--run-dir", mesh.run_dir, "--model", model, "Say")
    assert (ended.returncode, ended.stdout) == (2, "")
    (line,) = ended.stderr.splitlines()
    assert line.startswith("error: the model cannot do this: ")
