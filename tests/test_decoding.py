from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from expertmesh.model.decoding import MOST_KEY_BLOCKS, TokenStep, fits, token_table
from expertmesh.model.graphs import BUCKETS
from tests.decoders import SPECS, Serving, random_model, texts

SPARE = 99


class Unrecorded:
    """Graphs that record nothing, and so work on the processor."""

    def run(self, function: Any, rows_ND: Tensor, *others: Tensor, fixed: Any = ()) -> Any:
        return function(rows_ND, *others, *fixed)


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def test_a_table_has_the_places_of_every_row_and_pads_with_the_spare_block() -> None:
    table = token_table([(5, [7]), (300, [4, 2, 9, 8]), (127, [3, 6])], 128, SPARE)
    assert table.shape == (BUCKETS[0], 1 + 4)
    assert table[:3].tolist() == [[5, 7, 7, 7, 7], [300, 4, 2, 9, 4], [127, 3, 3, 3, 3]]
    assert (table[3:, 0] == 0).all()
    assert (table[3:, 1:] == SPARE).all()


def test_what_is_too_large_is_not_recorded() -> None:
    assert fits(1, 1)
    assert fits(BUCKETS[0], MOST_KEY_BLOCKS // BUCKETS[0])
    assert not fits(BUCKETS[0], MOST_KEY_BLOCKS // BUCKETS[0] + 1)
    assert not fits(BUCKETS[0] + 1, MOST_KEY_BLOCKS // BUCKETS[0])
    assert not fits(BUCKETS[-1] + 1, 1)


@pytest.mark.parametrize("name", ["grouped", "narrow window", "sinks", "latent", "qk norm of a head"])
def test_a_step_told_by_a_table_computes_what_any_other_step_computes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Seen(TokenStep):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr("expertmesh.model.gating.TokenStep", Seen)
    lengths = [1, 2, 3, 17, 64, 65, 127, 128, 129, 130, 200, 255, 256, 257, 299, 300]
    assert len(lengths) == BUCKETS[0], "no row of padding, for which there is no block on the processor"
    results = []
    for graphs in (None, Unrecorded()):
        model = random_model(SPECS[name])
        for stage in model.gating:
            stage.graphs = graphs
        serving = Serving(model, 40)
        sequences = texts(lengths)
        serving.step([(number, ids_T[:-1]) for number, ids_T in enumerate(sequences) if len(ids_T) > 1])
        assert not made
        results.append(torch.cat(serving.step([(number, ids_T[-1:]) for number, ids_T in enumerate(sequences)])))
    assert len(made) == len(model.gating)
    torch.testing.assert_close(results[1], results[0], atol=1e-4, rtol=1e-4)


def test_blocks_of_another_sequence_are_emptied_before_a_token_is_put_into_them() -> None:
    model = random_model(SPECS["grouped"])
    for stage in model.gating:
        stage.graphs = Unrecorded()
    serving = Serving(model, 40)
    for pool in [*serving.cache._keys, *serving.cache._values]:
        pool.fill_(torch.nan)
    serving.cache.renew(range(40))
    logits = serving.step(list(enumerate(texts([1] * BUCKETS[0]))))
    assert torch.isfinite(torch.cat(logits)).all()
