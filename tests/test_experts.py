from __future__ import annotations

import pytest
import torch

from expertmesh.model.cuda import has_kernels, rows_of_tiles, serves, tiles_of
from expertmesh.model.experts import JOINED_ELEMENTS, ExpertGroup
from expertmesh.model.graphs import BUCKETS, Graphs, padded
from expertmesh.model.layers import GatedMLP, arrange
from expertmesh.model.spec import ExpertSpec


def test_a_group_gives_each_row_to_its_expert() -> None:
    torch.manual_seed(0)
    held = {expert: GatedMLP(32, ExpertSpec(width=24)).eval() for expert in (1, 4, 6)}
    rows_ND = torch.randn(9, 32)
    with torch.inference_mode():
        got = ExpertGroup(held, Graphs())([1, 6], [4, 5], rows_ND)
        assert torch.equal(got, torch.cat([held[1](rows_ND[:4]), held[6](rows_ND[4:])]))


def test_experts_that_are_computed_together_give_the_bits_that_each_gives_alone() -> None:
    torch.manual_seed(0)
    for spec in (ExpertSpec(width=40), ExpertSpec(width=24, bias=True, activation="swiglu_clamped", limit=7.0)):
        held = {expert: arrange(GatedMLP(36, spec).eval()) for expert in range(7)}
        group = ExpertGroup(held)
        most = JOINED_ELEMENTS // spec.width
        with torch.inference_mode():
            for counts in ([1, 1], [3, 5, 2], [1, 9, 17, 4, 2, 7, 8], [most - 1, 1], [most, 1]):
                rows_ND = torch.randn(sum(counts), 36)
                alone = [held[expert](piece) for expert, piece in enumerate(rows_ND.split(counts))]
                assert torch.equal(group(range(len(counts)), counts, rows_ND), torch.cat(alone))


def test_tiles_cover_every_row_once_and_never_two_experts() -> None:
    counts = [1, 16, 17, 40]
    tiles = tiles_of([3, 0, 7, 2], counts, 16).tolist()
    assert tiles == [
        [3, 0, 1], [0, 1, 17], [7, 17, 33], [7, 33, 34], [2, 34, 50], [2, 50, 66], [2, 66, 74],
    ]  # fmt: skip
    more = tiles_of([3, 0, 7, 2], counts, 16, least=10)
    assert more[:7].tolist() == tiles
    assert not more[7:].any(), "a tile without rows"


@pytest.mark.parametrize("experts", [1, 8, 64])
def test_a_recording_has_room_for_the_tiles_of_however_its_rows_are_spread(experts: int) -> None:
    for rows in BUCKETS:
        tile_rows = rows_of_tiles(rows, experts)
        most = rows // tile_rows + min(rows, experts)
        for owners in range(1, min(experts, rows) + 1):
            counts = [1] * (owners - 1) + [rows - owners + 1]
            even = [rows // owners + (owner < rows % owners) for owner in range(owners)]
            assert max(len(tiles_of(range(owners), spread, tile_rows)) for spread in (counts, even)) <= most


def test_rows_are_padded_to_what_is_recorded() -> None:
    assert [padded(rows) for rows in (1, 16, 17, 64, 256, 257)] == [16, 16, 64, 64, 256, 0]


def test_on_the_processor_nothing_is_recorded_and_no_kernel_is_taken() -> None:
    graphs, x_ND = Graphs(), torch.ones(3, 4)
    with torch.inference_mode():
        assert not serves(x_ND)
        (doubled,) = graphs.run(lambda rows, factor: (rows * factor,), x_ND, fixed=(2,))
    assert torch.equal(doubled, x_ND * 2)
    assert graphs.count == 0


def test_kernels_need_a_triton_that_has_small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"3.2.0": False, "3.3.1": True, "3.10.0": True, "4.0.0": True}
    monkeypatch.setattr("expertmesh.model.cuda.shutil.which", lambda name: name)
    for number, fits in found.items():
        monkeypatch.setattr("expertmesh.model.cuda.version", lambda package, number=number: number)
        assert has_kernels.__wrapped__() is fits
    monkeypatch.setattr("expertmesh.model.cuda.shutil.which", lambda name: None)
    assert not has_kernels.__wrapped__(), "Triton needs a C compiler"
