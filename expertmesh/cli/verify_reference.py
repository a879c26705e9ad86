"""How `expertmesh verify` shows what comparing with a reference gave."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from expertmesh.verification.agreement import Agreement


def show_agreement(found: Agreement, tolerance: float) -> bool:
    """Prints how far a reference is; gives whether it agrees."""
    table = Table("layer", "max |Δ hidden|", "routes equal", "max |Δ weight|")
    for layer in found.layers:
        shown = f"{layer.equal_routes} of {layer.tokens}" if layer.tokens else "no experts"
        weight = f"{layer.weight:.1e}" if layer.tokens else ""
        table.add_row(str(layer.layer), f"{layer.hidden:.1e}", shown, weight)
    equal, routes = found.routes
    table.add_section()
    table.add_row("all", f"{found.hidden:.1e}", f"{equal} of {routes}", f"{found.weight:.1e}")
    print()
    print_table(table)
    print(f"max |Δ logit|       {found.logits:.1e}; the reference's have a standard deviation of {found.scale:.2f}")
    print(f"greedy tokens       {found.equal_tokens} of {found.tokens} equal")
    if found.spec.dtype == "bfloat16":
        like = found.likeness
        print(f"judged              {like.tokens} tokens, which no flipped route can have reached; of these:")
        print(f"mean divergence     {like.divergence:.2g} nats")
        print(f"smallest cosine     {like.cosine:.4f}")
        print(f"top-1 agreement     {like.top_1:.1%}")
        measure = "by the measures for bfloat16"
    else:
        measure = f"within {tolerance:g}"
    faults = found.faults(tolerance)
    for fault in faults:
        print(f"disagrees           {fault}")
    print(f"THE REFERENCE DISAGREES, judged {measure}" if faults else f"the reference agrees {measure}")
    return not faults


def print_table(table: Table) -> None:
    """Prints a table, wide enough where nobody looks at a terminal."""
    console = Console(highlight=False)
    Console(width=None if console.is_terminal else 120, highlight=False).print(table)
