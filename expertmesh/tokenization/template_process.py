"""The process that renders chat templates: `python -P -m expertmesh.tokenization.template_process`.

A template comes with a checkpoint, from anybody. It may loop for ever, ask for any amount of memory or recurse, and
nothing inside a Python process can stop that. So it is rendered here, in Jinja2's sandbox, under a limit of memory, and
under an alarm that ends this process when a rendering takes too long. When stdin ends, which it does however the
parent ends, this process ends too: at once while it waits, and by the alarm while it renders.

Frames go over stdin and stdout: four bytes of length, big-endian, then JSON. The first frame in is a table with
`template` and `variables`, answered by a table with `ready`; each further one is a list of [role, content], answered by
a table with `text`, or with `refusal` for what the template itself has to say, or with `failure`.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any, BinaryIO

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

RENDER_TIMEOUT_S = 2.0
MAX_MEMORY_BYTES = 512 * 2**20
MAX_TEXT_BYTES = 2**20
MAX_FRAME_BYTES = 16 * 2**20
MAX_REFUSAL_CHARACTERS = 200


class Refusal(jinja2.TemplateError):
    """What a template says with `raise_exception`."""


class TextTooLong(Exception):
    """The rendered text is longer than `MAX_TEXT_BYTES`."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what an assistant wrote, for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja2 wants it so)

    def parse(self, parser: Parser) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise Refusal(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the escapes for HTML that Jinja2's own filter makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def environment() -> ImmutableSandboxedEnvironment:
    """The names and switches that chat templates are written for."""
    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


class Renderer:
    """One model's template.

    Args:
        template: Its source.
        variables: What it may use beside the messages: `bos_token` and the like.
    """

    def __init__(self, template: str, variables: dict[str, str]) -> None:
        self._source = template
        self._variables = variables
        self._template: jinja2.Template | None = None

    def answer(self, messages: Sequence[Sequence[str]]) -> dict[str, str]:
        """Gives the table that goes back to the parent."""
        try:
            return {"text": self._render([{"role": role, "content": content} for role, content in messages])}
        except Refusal as error:
            return {"refusal": "".join(c for c in str(error) if c.isprintable())[:MAX_REFUSAL_CHARACTERS]}
        except TextTooLong:
            return {"failure": f"its text is longer than {MAX_TEXT_BYTES} bytes"}
        except MemoryError:
            return {"failure": "it needs too much memory"}
        except Exception as error:
            return {"failure": type(error).__name__}

    def _render(self, messages: list[dict[str, str]]) -> str:
        if self._template is None:
            self._template = environment().from_string(self._source)
        values = {**self._variables, "messages": messages, "add_generation_prompt": True}
        values |= {"tools": None, "documents": None}
        parts: list[str] = []
        size_bytes = 0
        for part in self._template.generate(values):
            size_bytes += len(part.encode())
            if size_bytes > MAX_TEXT_BYTES:
                raise TextTooLong
            parts.append(part)
        return "".join(parts)


def _read(stream: BinaryIO) -> Any:
    """Gives the next frame, or None at the end."""
    head = stream.read(4)
    if len(head) < 4:
        return None
    size = int.from_bytes(head, "big")
    body = stream.read(size) if size <= MAX_FRAME_BYTES else b""
    return json.loads(body) if len(body) == size else None


def _write(stream: BinaryIO, value: dict[str, str]) -> None:
    body = json.dumps(value).encode()
    stream.write(len(body).to_bytes(4, "big") + body)
    stream.flush()


def _limit() -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told, and ends stdin
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def main() -> None:
    """Answers until stdin ends."""
    _limit()
    stdin, stdout = sys.stdin.buffer, sys.stdout.buffer
    first = _read(stdin)
    if first is None:
        return
    renderer = Renderer(first["template"], first["variables"])
    _write(stdout, {"ready": "yes"})
    while (messages := _read(stdin)) is not None:
        signal.setitimer(signal.ITIMER_REAL, RENDER_TIMEOUT_S)
        _write(stdout, renderer.answer(messages))
        signal.setitimer(signal.ITIMER_REAL, 0)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        sys.stderr.close()
