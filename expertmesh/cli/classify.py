"""`expertmesh classify`: texts in, labels out, through the running mesh or one started for it."""

from __future__ import annotations

import json
import sys
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from expertmesh.cli import placement, session
from expertmesh.client import Client
from expertmesh.errors import InvalidInput, MeshError, SetupError, WrongPart
from expertmesh.serving.inference import parse_route, route_name
from expertmesh.serving.requests import MAX_TEXT_BYTES, check_texts
from expertmesh.v1.inference_pb2 import Route

CALL_TEXTS = 64


@dataclass(frozen=True)
class Line:
    """One text to classify.

    Attributes:
        text: The text, as far as it could be read.
        error: Why it cannot be classified; empty if it can.
    """

    text: str
    error: str = ""


def classify(
    run_dir: placement.RunDir,
    texts: Annotated[list[str] | None, typer.Argument(help="Raw texts.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read texts from a file, one raw text a line; - is stdin.")] = None,
    route: Annotated[str, typer.Option(help="mesh (the full model if the mesh cannot) or full-model.")] = "mesh",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    address: placement.Address = "",
    model: Annotated[Path | None, typer.Option(help="Model to start when no mesh runs.")] = None,
) -> None:
    """Prints label, confidence and route of every text; exits with 1 if one could not be classified."""
    if bool(texts) == (file is not None):
        raise SetupError("give texts, or --file with one text a line")
    lines = [_checked(text) for text in texts] if texts else list(read_lines(file))  # type: ignore[arg-type]
    if not lines:
        raise SetupError(f"{file} holds no text")
    wanted = parse_route(route)
    answers = session.run(_classify(lines, wanted, address, run_dir, model))
    if as_json:
        for answer in answers:
            print(json.dumps(answer, ensure_ascii=False))
    else:
        _show(answers)
    if any("error" in answer for answer in answers):
        raise typer.Exit(1)


def read_lines(file: Path) -> Iterable[Line]:
    """Reads one raw text a line; a line that is no UTF-8, is empty or too long carries its error.

    Raises:
        SetupError: The file cannot be read.
    """
    try:
        data = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
    except OSError as error:
        raise SetupError(f"{file} cannot be read: {error.strerror}") from None
    for line in data.removesuffix(b"\n").split(b"\n") if data else []:
        try:
            yield _checked(line.removesuffix(b"\r").decode())
        except UnicodeDecodeError:
            yield Line(line.decode(errors="replace"), "the text is not UTF-8")


def _checked(text: str) -> Line:
    try:
        check_texts([text], "text")
        text.encode()
    except UnicodeEncodeError:
        return Line(text.encode(errors="replace").decode(), "the text is not UTF-8")
    except InvalidInput:
        empty = not text or text.isspace()
        return Line(text[:80], "the text is empty" if empty else f"the text has more than {MAX_TEXT_BYTES} bytes")
    return Line(text)


async def _classify(
    lines: list[Line], route: Route, address: str, run_dir: Path, model: Path | None
) -> list[dict[str, Any]]:
    good = [line.text for line in lines if not line.error]
    answers: list[dict[str, Any]] = []
    if good:
        async with (
            session.any_mesh(model, address, run_dir, placement.read_options()) as mesh,
            Client(mesh.grpc) as client,
        ):
            answers = [answer async for answer in _answers(client, good, route)]
    given = iter(answers)
    return [{"text": line.text, "error": line.error} if line.error else next(given) for line in lines]


async def _answers(client: Client, texts: list[str], route: Route) -> AsyncIterator[dict[str, Any]]:
    for start in range(0, len(texts), CALL_TEXTS):
        chunk = texts[start : start + CALL_TEXTS]
        try:
            for answer in await _call(client, chunk, route):
                yield answer
        except InvalidInput:  # one text is at fault: the others are still answered
            for text in chunk:
                try:
                    yield (await _call(client, [text], route))[0]
                except InvalidInput as error:
                    yield {"text": text, "error": str(error)}
        except WrongPart as error:
            raise SetupError(f"the model cannot do this: {error}") from None
        except MeshError as error:
            raise SetupError(f"the mesh could not answer: {error}") from None


async def _call(client: Client, texts: list[str], route: Route) -> list[dict[str, Any]]:
    response = await client.classify(texts, route=route)
    return [
        {
            "text": text,
            "label": result.label,
            "confidence": max(result.probabilities),
            "probabilities": dict(zip(response.labels, result.probabilities, strict=True)),
            "route": route_name(result.route),
            "exact": result.exact,
            "tokens": result.tokens,
            "truncated": result.truncated,
        }
        for text, result in zip(texts, response.results, strict=True)
    ]


def _show(answers: list[dict[str, Any]]) -> None:
    console = Console(width=None if Console().is_terminal else 120, highlight=False)
    table = Table("label", "confidence", "route", "text")
    for answer in answers:
        text = answer["text"] if len(answer["text"]) <= 70 else answer["text"][:69] + "…"
        if "error" in answer:
            table.add_row("error", "", "", Text(f"{text} ({answer['error']})"), style="red")
        else:
            truncated = " (truncated)" if answer["truncated"] else ""
            table.add_row(answer["label"], f"{answer['confidence']:.1%}", answer["route"], Text(text + truncated))
    console.print(table)
