"""Steps of a home whose stages have devices, in simulated time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from expertmesh.serving.passes import Provenance
from expertmesh.serving.scheduler import StepLimits
from expertmesh.serving.steps import Work
from expertmesh.v1.sampling_pb2 import TokenLogprobs
from tests.doubles.keeper import Keeper, drawn, followers, scheduling, wish
from tests.doubles.simulated_time import run_simulated

LAYERS = 3


class Devices(Keeper):
    """Attention and experts of each layer take turns at their devices.

    Args:
        gating: Of attention.
        experts: Of experts; may be the same.
        fixed_s: What a stage takes.
        row_s: What it takes for each row besides.
    """

    def __init__(self, gating: asyncio.Lock, experts: asyncio.Lock, fixed_s: float, row_s: float) -> None:
        super().__init__()
        self._stages = [gating, experts] * LAYERS
        self._fixed_s, self._row_s = fixed_s, row_s
        self.busy_s = 0.0  # of all devices together

    async def step(self, work: Sequence[Work]) -> tuple[list[TokenLogprobs], Sequence[Provenance]]:
        took_s = self._fixed_s + self._row_s * sum(piece.rows for piece in work)
        for device in self._stages:
            async with device:
                await asyncio.sleep(took_s)
                self.busy_s += took_s
        return await super().step(work)


def run(
    micro_batches: int, tokens: int, rows: int, fixed_s: float, row_s: float, shared: bool = False
) -> tuple[float, float]:
    """32 streams at once; gives (tokens per second, busy share of a device)."""

    async def main() -> tuple[float, float]:
        gating = asyncio.Lock()
        home = Devices(gating, gating if shared else asyncio.Lock(), fixed_s, row_s)
        clock = asyncio.get_running_loop().time
        async with scheduling(home, limits=StepLimits(rows, micro_batches=micro_batches)) as scheduler:
            started_s = clock()
            wishes = [wish(1, tokens, wait_s=3600) for _ in range(32)]
            assert await asyncio.gather(*(drawn(scheduler, one) for one in wishes)) == [
                followers(one) for one in wishes
            ]
            took_s = clock() - started_s
        return 32 * tokens / took_s, home.busy_s / took_s / (1 if shared else 2)

    return run_simulated(main())


@pytest.mark.parametrize(
    ("rows", "fixed_s", "row_s"),
    [(8, 0.005, 0.0), (256, 0.0002, 0.0003)],  # more streams than a step may carry; rows that cost
)
def test_two_steps_keep_both_devices_busy(rows: int, fixed_s: float, row_s: float) -> None:
    one, _ = run(1, 60, rows, fixed_s, row_s)
    two, busy = run(2, 60, rows, fixed_s, row_s)
    assert two >= 1.8 * one
    assert busy >= 0.9
    found, _ = run(0, 400, rows, fixed_s, row_s)
    assert found >= 0.9 * two


def test_what_is_fixed_is_not_made_faster_by_halves() -> None:
    one, _ = run(1, 60, 256, 0.005, 0.0)
    two, _ = run(2, 60, 256, 0.005, 0.0)
    assert two == pytest.approx(one, rel=0.1)


def test_where_all_share_a_device_one_step_at_a_time_is_found() -> None:
    one, busy = run(1, 60, 256, 0.005, 0.0001, shared=True)
    two, _ = run(2, 60, 256, 0.005, 0.0001, shared=True)
    assert busy >= 0.95
    assert two <= 0.8 * one
    found, _ = run(0, 400, 256, 0.005, 0.0001, shared=True)
    assert found >= 0.93 * one
