"""`expertmesh generate`: a prompt in, its continuation out, as it comes."""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from expertmesh.cli import placement, session
from expertmesh.client import Client
from expertmesh.errors import CorruptReply, InvalidInput, MeshError, SetupError, WrongPart
from expertmesh.local import state
from expertmesh.rpc.deadline import MAX_TIMEOUT_S
from expertmesh.serving.inference import parse_route, route_name, told_missing
from expertmesh.v1 import inference_pb2
from expertmesh.v1.inference_pb2 import FinishReason, GenerateRequest, GenerateResponse
from expertmesh.v1.tokenizer_pb2 import Chat, ChatMessage

DEFAULT_MODEL = Path("models/tinytext")
INT32_MAX = 2**31 - 1
# What a terminal takes for commands: a model must not be able to give it any.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass
class _Choice:
    """One answer, as far as it has come."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = inference_pb2.FINISH_REASON_UNSPECIFIED
    route: inference_pb2.Route = inference_pb2.ROUTE_UNSPECIFIED
    exact: bool = True
    profile: str = ""
    missing: set[tuple[int, int]] = field(default_factory=set)
    seed: int = 0

    def add(self, message: GenerateResponse) -> None:
        if self.finish_reason:  # there is no more of it; the message is here for its usage
            return
        self.text += message.text
        self.ids.extend(token.id for token in message.tokens)
        self.finish_reason = message.finish_reason
        self.route = max(self.route, message.route)  # in the order mesh, full model, degraded
        self.exact &= message.exact
        self.profile = message.profile
        self.missing.update((one.layer, one.expert) for one in message.missing_experts)
        self.seed = message.seed

    @property
    def finish(self) -> str:
        return FinishReason.Name(self.finish_reason).removeprefix("FINISH_REASON_").lower()


def generate(
    run_dir: placement.RunDir,
    prompt: Annotated[
        list[str], typer.Argument(help="Words of the prompt; a single - reads it from stdin, every byte of it.")
    ],
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.", min=1, max=INT32_MAX)] = 256,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.", min=0, max=100)] = 0.8,
    top_k: Annotated[int, typer.Option(help="Only the k likeliest; 0: no limit.", min=0, max=INT32_MAX)] = 0,
    top_p: Annotated[float, typer.Option(help="Only the likeliest that make up this share.", min=0, max=1)] = 1.0,
    min_p: Annotated[float, typer.Option(help="Only those this likely beside the likeliest.", min=0, max=1)] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1 repeats less; 1: none.", min=0, max=100)] = 1.0,
    seed: Annotated[
        int | None, typer.Option(help="The same seed gives the same text; drawn by default.", min=0, max=2**64 - 1)
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer; repeatable.")] = None,
    n: Annotated[int, typer.Option("--n", help="Answers to draw; shown one after another.", min=1, max=16)] = 1,
    chat: Annotated[bool, typer.Option("--chat", help="The prompt is a user's message to a chat model.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object for each answer, at the end.")] = False,
    route: Annotated[str, typer.Option(help="mesh (the full model if the mesh cannot) or full-model.")] = "mesh",
    contract: Annotated[str, typer.Option(help="exact, mesh-only or degraded-ok.")] = "exact",
    address: placement.Address = "",
    model: Annotated[Path | None, typer.Option(help="Model to start when no mesh runs.")] = None,
) -> None:
    """Prints what the model writes after the prompt, while it writes it, and one line about it on stderr."""
    text = _read_prompt(prompt)
    request = GenerateRequest(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=[_checked(one, "--stop") for one in stop or ()],
        n=n,
        contract=_parse_contract(contract),
        route=parse_route(route),
    )
    if chat:
        request.chat.CopyFrom(Chat(messages=[ChatMessage(role="user", content=text)]))
    else:
        request.text = text
    if not address and model is None and state.find(run_dir) is None:
        model = DEFAULT_MODEL
    try:
        session.run(_generate(request, as_json, address, run_dir, model))
    except BrokenPipeError:  # whoever read has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


async def _generate(request: GenerateRequest, as_json: bool, address: str, run_dir: Path, model: Path | None) -> None:
    async with (
        session.any_mesh(model, address, run_dir, placement.read_options()) as mesh,
        Client(mesh.grpc, timeout_s=MAX_TIMEOUT_S) as client,
    ):
        choices = [_Choice() for _ in range(request.n)]
        printer = None if as_json else _Printer(choices)
        started_s = time.monotonic()
        try:
            async with aclosing(client.generate(request)) as messages:
                async for message in messages:
                    if not 0 <= message.choice < len(choices):
                        raise CorruptReply(f"the mesh answered with choice {message.choice}, which was not asked for")
                    choices[message.choice].add(message)
                    if printer is not None:
                        printer.show()
            if not all(choice.finish_reason for choice in choices):
                raise CorruptReply("the answer ended before it was finished")
        except InvalidInput:
            raise
        except WrongPart as error:
            raise SetupError(f"the model cannot do this: {error}") from None
        except MeshError as error:
            raise SetupError(f"the mesh could not answer: {error}") from None
        finally:
            if printer is not None:
                printer.end_line()
        _sum_up(choices, time.monotonic() - started_s)
    if as_json:
        for number, choice in enumerate(choices):
            print(json.dumps(_object(number, choice), ensure_ascii=False))
        sys.stdout.flush()


class _Printer:
    """Prints choices one after another, each as it grows; those that come later wait for the one before them."""

    def __init__(self, choices: list[_Choice]) -> None:
        self._choices = choices
        self._current = 0
        self._shown = 0
        self._last = "\n"
        self._is_terminal = sys.stdout.isatty()

    def show(self) -> None:
        """Prints what is new."""
        while self._current < len(self._choices):
            choice = self._choices[self._current]
            self._write(choice.text[self._shown :])
            self._shown = len(choice.text)
            if not choice.finish_reason:
                break
            self._current += 1
            self._shown = 0
            if self._current < len(self._choices):
                self.end_line()
                self._write("---\n")

    def end_line(self) -> None:
        """Ends the line that is begun, if one is."""
        if self._last != "\n":
            self._write("\n")

    def _write(self, text: str) -> None:
        if text:
            sys.stdout.write(text.translate(_CONTROLS) if self._is_terminal else text)
            sys.stdout.flush()
            self._last = text[-1]


def _sum_up(choices: list[_Choice], seconds: float) -> None:
    tokens = sum(len(choice.ids) for choice in choices)
    route = route_name(max(choice.route for choice in choices))
    exact = "exact" if all(choice.exact for choice in choices) else "not exact"
    finish = ", ".join(choice.finish for choice in choices)
    missing = sorted(set().union(*(choice.missing for choice in choices)))
    if missing:
        exact += ", without " + ", ".join(f"expert {expert} of layer {layer}" for layer, expert in missing)
    print(
        f"{tokens} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s), {route}, {exact}, "
        f"seed {choices[0].seed}, finish: {finish}",
        file=sys.stderr,
    )


def _object(number: int, choice: _Choice) -> dict[str, object]:
    return {
        "choice": number,
        "text": choice.text,
        "ids": choice.ids,
        "finish_reason": choice.finish,
        "route": route_name(choice.route),
        "exact": choice.exact,
        "profile": choice.profile,
        **told_missing(choice.missing),
        "seed": choice.seed,
    }


def _read_prompt(words: list[str]) -> str:
    if words != ["-"]:
        return _checked(" ".join(words), "the prompt")
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError:
        raise SetupError("the prompt is not UTF-8") from None


def _checked(text: str, name: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise SetupError(f"{name} is not UTF-8") from None
    return text


def _parse_contract(name: str) -> inference_pb2.Contract:
    contracts = {
        "exact": inference_pb2.CONTRACT_EXACT,
        "mesh-only": inference_pb2.CONTRACT_MESH_ONLY,
        "degraded-ok": inference_pb2.CONTRACT_DEGRADED_OK,
    }
    if name not in contracts:
        raise InvalidInput(f"contract {name[:64]!r} is not known; known: {', '.join(contracts)}", "contract")
    return contracts[name]
