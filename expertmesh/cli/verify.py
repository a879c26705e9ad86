"""`expertmesh verify`: mesh against full model bit by bit, against a reference, and a split against its original."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.cli import placement, session, verify_generator, verify_texts
from expertmesh.errors import SetupError
from expertmesh.verification.agreement import LEAST_COSINE, LEAST_TOP_1, MOST_DIVERGENCE, TOLERANCE

CALL_TEXTS, CALLERS, MAX_TOKENS = 32, 4, 16


def verify(
    model: placement.Model = placement.DEFAULT_MODEL,
    inputs: Annotated[Path | None, typer.Option(help="Raw texts, one a line; by default made-up ones.")] = None,
    call_texts: Annotated[
        int | None, typer.Option("--call-texts", help=f"Texts in one call, {CALL_TEXTS} by default.", min=1, max=1024)
    ] = None,
    callers: Annotated[
        int | None, typer.Option(help=f"Calls under way at once, {CALLERS} by default.", min=1, max=256)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help=f"Tokens of each generated answer, {MAX_TOKENS} by default.", min=1, max=1024)
    ] = None,
    reference: Annotated[
        Path | None,
        typer.Option(help="Ids, logits, hidden states, routes and tokens of another implementation (.npz)."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help=f"Largest difference from the reference, {TOLERANCE:g} by default; routes and tokens must be equal."
            f" A bfloat16 model is judged where no flipped route reaches: mean divergence at most"
            f" {MOST_DIVERGENCE} nats, cosine at least {LEAST_COSINE}, the likeliest token the same for"
            f" {LEAST_TOP_1:.0%}.",
            min=0,
        ),
    ] = None,
    layerwise: Annotated[
        Path | None,
        typer.Option(
            help="The folder that the model was split from: compares every part with it, one at a time, here."
        ),
    ] = None,
    expert_services: placement.ExpertServices = 0,
    replicas: placement.Replicas = None,
    device: placement.Devices = None,
    address: Annotated[str, typer.Option(help="gRPC address of a gateway; by default a mesh is started for it.")] = "",
    record: Annotated[bool, typer.Option("--record", help="Note the profile in the manifest if all is equal.")] = False,
) -> None:
    """Exits with 0 if all is equal, with 1 if something differs, with 2 if it could not be found out."""
    manifest = Manifest.read(model)
    bound = TOLERANCE if tolerance is None else tolerance
    given = {
        "--inputs": inputs is not None,
        "--call-texts": call_texts is not None,
        "--callers": callers is not None,
        "--max-tokens": max_tokens is not None,
        "--reference": reference is not None,
        "--tolerance": tolerance is not None,
        "--expert-services": expert_services > 0,
        "--replicas": bool(replicas),
        "--device": bool(device),
        "--address": bool(address),
        "--record": record,
    }
    if layerwise is not None:
        allowed = ("--reference", "--tolerance") if manifest.spec.generates and reference is not None else ()
        _refuse(given, "with --layerwise, which starts no mesh", *(option for option in given if option not in allowed))
        from expertmesh.cli import verify_layers  # torch takes its time, and only this needs it

        equal, profile = verify_layers.verify(model, layerwise, reference, bound), ""
    else:
        mesh = verify_texts.Mesh(
            model, address, placement.read_options(expert_services, replicas, device, inspect=True)
        )
        if manifest.spec.generates:
            _refuse(given, "for a model that generates", "--call-texts")
            if reference is None:
                _refuse(given, "without --reference", "--tolerance")
            else:
                _refuse(given, "with --reference", "--inputs", "--max-tokens")
            work = verify_generator.Work(inputs, callers or CALLERS, max_tokens or MAX_TOKENS, reference)
            equal, profile = session.run(verify_generator.verify(mesh, manifest, work, bound))
        else:
            _refuse(given, "for a classifier", "--max-tokens", "--reference", "--tolerance")
            equal, profile = session.run(
                verify_texts.verify(mesh, inputs, call_texts or CALL_TEXTS, callers or CALLERS)
            )
    if not equal:
        raise typer.Exit(1)
    if record:
        replace(Manifest.read(model), verified_on=profile).write(model)


def _refuse(given: dict[str, bool], why: str, *options: str) -> None:
    for option in options:
        if given[option]:
            raise SetupError(f"{option} cannot be used {why}")
