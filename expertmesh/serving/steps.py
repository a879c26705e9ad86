"""What shares a step: a row of every sequence that decodes, and chunks of prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expertmesh.serving.generation import Generation

OLDEST_SHARE = 2  # the oldest prompt gets at least one of so many rows that are left beside those that decode


@dataclass(frozen=True)
class Work:
    """Rows of one sequence in a step.

    Attributes:
        generation: The sequence.
        rows: How many of its missing tokens are computed.
        draws: Whether the next token is drawn from the last of them.
    """

    generation: Generation
    rows: int
    draws: bool

    @property
    def ids(self) -> list[int]:
        """The tokens that are computed."""
        start = self.generation.cached
        return self.generation.ids[start : start + self.rows]


def plan_step(running: Sequence[Generation], rows: int) -> list[Work]:
    """What shares the next step: first every sequence that needs one row, then chunks of the others.

    The oldest prompt always gets on, since it has half of what is left to itself. The rest goes to those that need
    least, so that a short request that has just come joins this step, however long the prompts before it are.

    Args:
        running: The sequences that may take part, oldest first, not more than `rows`.
        rows: Most token rows in the step.

    Returns:
        Work for at least one sequence; together at most `rows` rows.
    """
    work = [Work(generation, 1, True) for generation in running if generation.missing == 1][:rows]
    left = rows - len(work)
    prompts = [generation for generation in running if generation.missing > 1]
    if not (left and prompts):
        return work
    generation2chunk = dict.fromkeys(prompts, 0)
    generation2chunk[prompts[0]] = min(prompts[0].missing, -(-left // OLDEST_SHARE))
    left -= generation2chunk[prompts[0]]
    for generation in sorted(prompts, key=lambda one: one.missing):  # of equals the older one first
        chunk = min(generation.missing - generation2chunk[generation], left)
        generation2chunk[generation] += chunk
        left -= chunk
    return work + [
        Work(generation, chunk, chunk == generation.missing) for generation, chunk in generation2chunk.items() if chunk
    ]


def plan_share(idle: Sequence[Generation], running: int, missing: int, steps: int, rows: int) -> list[Work]:
    """What shares the next step, where so many steps are to be under way: its fair share of sequences and of rows.

    Of those that are free whoever had no step for the longest time comes first, so that nobody waits for ever.

    Args:
        idle: The sequences that are in no step, oldest first; at least one.
        running: How many sequences there are, in steps or not.
        missing: Tokens that all of these miss.
        steps: How many steps are to be under way.
        rows: Most token rows in a step.
    """
    steps = min(steps, running)
    most = min(rows, -(-running // steps))
    taken = idle
    if len(idle) > most:
        chosen = set(sorted(idle, key=lambda one: one.stepped)[:most])
        taken = [generation for generation in idle if generation in chosen]
    return plan_step(taken, min(rows, max(len(taken), -(-missing // steps))))
