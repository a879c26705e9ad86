"""`expertmesh verify` of a language model: both routes against each other, and the mesh against a reference."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.cli.verify_reference import print_table, show_agreement
from expertmesh.cli.verify_texts import Mesh, make_texts, read_texts
from expertmesh.client import Client
from expertmesh.errors import InvalidInput, SetupError
from expertmesh.model.spec import ModelSpec
from expertmesh.v1.inference_pb2 import GenerateRequest, TokenIds, TokenizeRequest
from expertmesh.v1.inspection_pb2 import InspectResponse
from expertmesh.verification.agreement import Agreement, Computed, agreement
from expertmesh.verification.answers import GREEDY, compare_answers, wishes
from expertmesh.verification.reference import Reference
from expertmesh.verification.sequences import SINGLE_TOKENS, compare_sequences, made_up, most_rows
from expertmesh.verification.tally import Findings

MADE_UP_TEXTS = 4
MADE_UP_WORDS = 24
PROMPTS = 8
PROMPT_TOKENS = 48


@dataclass(frozen=True)
class Work:
    """What is asked for.

    Attributes:
        inputs: File of prompts, if there is one.
        callers: Calls under way at once.
        max_tokens: Tokens of each generated answer.
        reference: File of another implementation's numbers, if there is one.
    """

    inputs: Path | None
    callers: int
    max_tokens: int
    reference: Path | None


async def verify(mesh: Mesh, manifest: Manifest, work: Work, tolerance: float) -> tuple[bool, str]:
    """Prints what came out; gives whether all is equal, and the numeric profile."""
    spec = manifest.spec
    reference = Reference.read(work.reference, spec) if work.reference else None
    if reference is not None and reference.ids_BT.shape[1] > most_rows(spec):
        length = reference.ids_BT.shape[1]
        raise SetupError(f"inspection shows at most {most_rows(spec)} tokens of this model at once, not {length}")
    found: Agreement | None = None
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("comparing", total=None)
        async with mesh.client() as client:
            if reference is None:
                findings = await _compare_routes(client, spec, work, lambda: progress.advance(task))
            else:
                findings, found = await _compare_reference(
                    client, spec, reference, work.callers, lambda: progress.advance(task)
                )
    _show_findings(findings)
    is_near = found is None or show_agreement(found, tolerance)
    return findings.are_equal and is_near, " + ".join(sorted(findings.profiles))


async def _compare_routes(client: Client, spec: ModelSpec, work: Work, progress: Callable[[], None]) -> Findings:
    texts = read_texts(work.inputs) if work.inputs else make_texts(MADE_UP_TEXTS, MADE_UP_WORDS)
    most = most_rows(spec)
    sequences = [] if work.inputs else made_up(spec)
    for number, text in enumerate(texts):
        try:
            reply = await client.tokenize(TokenizeRequest(text=text))
        except InvalidInput as error:
            if work.inputs:
                raise SetupError(f"{work.inputs}, text {number}: {error}") from None
            continue  # the context is shorter than what was made up
        sequences.extend([list(reply.ids)[:most]] if reply.ids else [])
    findings = await compare_sequences(client, sequences, SINGLE_TOKENS, work.callers, progress)
    short = [ids[:PROMPT_TOKENS] for ids in sequences[-PROMPTS:]]
    answers = await compare_answers(client, wishes(short, work.max_tokens, spec.context), work.callers, progress)
    return _joined(findings, answers)


async def _compare_reference(
    client: Client, spec: ModelSpec, reference: Reference, callers: int, progress: Callable[[], None]
) -> tuple[Findings, Agreement]:
    sequences = reference.ids_BT.tolist()
    traces: dict[int, InspectResponse] = {}

    def keep(trace: InspectResponse, index: int) -> None:
        traces[index] = trace

    findings = await compare_sequences(client, sequences, reference.ids_BT.size, callers, progress, keep)
    if not findings.was_inspected:
        raise SetupError("the mesh does not show hidden states; start it with inspection on")
    tokens = reference.generated_BG.shape[1]
    wanted = [
        (GREEDY, GenerateRequest(ids=TokenIds(ids=ids), max_tokens=tokens, temperature=0, ignore_end=True, logprobs=0))
        for ids in sequences
    ]
    answered: dict[int, list[int]] = {}

    def keep_answer(number: int, ids: list[int]) -> None:
        answered[number] = ids

    answers = await compare_answers(client, wanted, callers, progress, keep_answer)
    numbers = range(len(sequences))
    computed = Computed.of_traces(spec, [traces[n] for n in numbers], [answered[n] for n in numbers])
    return _joined(findings, answers), agreement(spec, reference, computed)


def _joined(sequences: Findings, answers: Findings) -> Findings:
    return Findings(
        sequences.tallies | answers.tallies,
        answers.inexact,
        answers.profiles,
        sequences.first or answers.first,
        sequences.was_inspected,
    )


def _show_findings(findings: Findings) -> None:
    table = Table("mesh against full model", "compared", "tokens", "differ", "bits", "largest difference")
    for tally in findings.tallies.values():
        differ = f"{tally.differing} of {tally.compared}"
        table.add_row(
            tally.setting, str(tally.compared), str(tally.tokens), differ, str(tally.bits), f"{tally.largest:g}"
        )
    print_table(table)
    print(f"profile             {' + '.join(sorted(findings.profiles))}")
    if not findings.was_inspected:
        print("logits              were not compared; start the mesh with `expertmesh up --inspect`")
    if findings.first is not None:
        print(f"first difference    {findings.first}")
    if findings.inexact:
        print(f"not exact           {findings.inexact} answers said that they mix numeric profiles")
    if findings.are_equal and findings.was_inspected:
        print("mesh and full model are bit-equal")
    elif findings.are_equal:
        print("generated tokens and their log probabilities are bit-equal")
    else:
        print("MESH AND FULL MODEL ARE NOT BIT-EQUAL" if findings.differing else "the mesh mixes numeric profiles")
