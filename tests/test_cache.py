from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from expertmesh.model import invariant
from expertmesh.model import tiles as tiles_module
from expertmesh.model.cache import BLOCK_TOKENS, KeyValueCache, blocks_of
from expertmesh.model.cached_sequences import CachedSequences
from expertmesh.model.full import FullModel
from expertmesh.model.invariant import Picked
from expertmesh.model.layers import arrange
from expertmesh.model.tiles import TILE_ROWS, Span, cut
from expertmesh.serving.leases import ID_BYTES, Leases, Place
from expertmesh.serving.passes import are_exact
from tests.decoders import CONTEXT, CPU, LATENT, PLAIN, SPECS, Serving, full_model, random_model, texts, whole_logits

BLOCKS = 40


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield
    torch.set_num_threads(before)


def few(examples: int) -> settings:
    return settings(max_examples=examples, deadline=None, database=None)


def differing_rows(got: Tensor, wanted: Tensor) -> int:
    assert got.shape == wanted.shape
    unequal = got.contiguous().view(torch.int32) != wanted.contiguous().view(torch.int32)
    return int(unequal.flatten(1).any(dim=1).sum())


def in_steps(model: FullModel, sequences: list[Tensor], chunks: list[int], seed: int, threads: int = 1) -> list[Tensor]:
    """Logits of sequences computed step by step.

    Each step takes some of the unfinished sequences, in any order, and of each as many rows as one of `chunks` says.
    Blocks are scattered, hold stale numbers, and go from sequences that have ended to the next.
    """
    chance, serving = random.Random(seed), Serving(model, BLOCKS, seed)
    waiting = list(range(len(sequences)))
    running = {waiting.pop(0): 0}
    logits: list[list[Tensor]] = [[] for _ in sequences]
    torch.set_num_threads(threads)
    while running:
        rows = []
        for sequence in chance.sample(sorted(running), chance.randint(1, len(running))):
            start = running[sequence]
            rows.append((sequence, sequences[sequence][start : start + chance.choice(chunks)]))
            running[sequence] += len(rows[-1][1])
        for (sequence, _), part in zip(rows, serving.step(rows), strict=True):
            logits[sequence].append(part)
            if running[sequence] == len(sequences[sequence]):
                del running[sequence]
                serving.forget(sequence)
        while waiting and (not running or chance.random() < 0.7):
            running[waiting.pop(0)] = 0
    torch.set_num_threads(1)
    return [torch.cat(parts) for parts in logits]


def changed_by_steps(
    model: FullModel, lengths: list[int], chunks: list[int], seed: int = 0, threads: int = 1, ids: int = 0
) -> int:
    """Rows whose logits come out otherwise in steps with mates than alone and whole on one thread."""
    sequences = texts(lengths, ids)
    got = in_steps(model, sequences, chunks, seed, threads)
    return sum(differing_rows(one, whole_logits(model, ids_T)) for one, ids_T in zip(got, sequences, strict=True))


# The promise: a row's logits are a function of the tokens before it and of nothing else.


@pytest.mark.parametrize("name", SPECS)
def test_every_spec_gives_the_same_bits_whole_in_chunks_and_token_by_token(name: str) -> None:
    model, sequences = full_model(name), texts(lengths := [1, 66, 131, 300, 7])
    alone = [whole_logits(model, ids_T) for ids_T in sequences]
    in_any_chunks = in_steps(model, sequences, [1, 5, 64, 70, 128, 300], seed=1, threads=2)
    in_odd_chunks = in_steps(model, sequences, [9, 33, 129], seed=2)
    together = model.logits(torch.cat(sequences), torch.tensor(lengths)).split(lengths)
    for got in (in_any_chunks, in_odd_chunks, together):
        assert sum(map(differing_rows, got, alone)) == 0


@pytest.mark.parametrize("name", ["grouped", "alternating windows", "sinks", "latent", "grouped in bfloat16"])
def test_three_blocks_come_out_the_same_token_by_token(name: str) -> None:
    assert changed_by_steps(full_model(name), [290], chunks=[1]) == 0


@few(60)
@given(
    st.sampled_from(sorted(SPECS)),
    st.lists(st.one_of(st.integers(1, 20), st.integers(1, 300)), min_size=1, max_size=5),
    st.lists(st.one_of(st.just(1), st.integers(1, 130), st.just(CONTEXT)), min_size=1, max_size=4),
    st.integers(0, 2**31),
    st.sampled_from([1, 1, 2]),
)
def test_no_schedule_changes_a_bit(name: str, lengths: list[int], chunks: list[int], seed: int, threads: int) -> None:
    chunks = [max(chunk, 4) for chunk in chunks] if sum(lengths) > 300 else chunks  # else it takes too many steps
    assert changed_by_steps(full_model(name), lengths, chunks, seed, threads, ids=seed % 1000) == 0


@few(20)
@given(
    st.sampled_from(["grouped", "latent", "layer norm", "gated shared expert", "clamped", "qk norm of a head"]),
    st.sampled_from(["float32", "bfloat16"]),
    st.integers(2, 75),
    st.integers(1, 45),
    st.sampled_from([1, 2, 3, 4, 6]),
    st.integers(1, 40),
    st.integers(0, 99),
)
def test_no_schedule_changes_a_bit_at_any_widths(
    name: str, dtype: str, width: int, expert_width: int, heads: int, head_width: int, seed: int
) -> None:
    spec = SPECS[name]
    narrow = {} if spec.attention.kind == "latent" else {"kv_heads": 1}
    if spec.attention.kind == "latent":
        narrow = {"value_width": 1 + seed % 12, "latent_rank": 1 + seed % 37, "query_rank": seed % 23}
    spec = replace(
        spec,
        width=width,
        expert=replace(spec.expert, width=expert_width),
        attention=replace(spec.attention, heads=heads, head_width=head_width, **narrow),
        rotary=replace(spec.rotary, frequencies=spec.rotary.frequencies[: head_width // 2]),
        dtype=dtype,
    )
    assert changed_by_steps(arrange(random_model(spec, seed)), [35, 130, 2], [1, 3, 40, 129], seed, 1 + seed % 2) == 0


def test_long_work_is_cut_into_batches_without_changing_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    model, lengths = full_model("grouped"), [300, 200, 140, 3]
    wanted = model.logits(torch.cat(texts(lengths)), torch.tensor(lengths))
    for elements in (1, 100_000):
        monkeypatch.setattr(tiles_module, "MAX_SCORES", elements)
        assert differing_rows(model.logits(torch.cat(texts(lengths)), torch.tensor(lengths)), wanted) == 0


def test_fp32_and_bf16_on_one_processor_are_exact_and_mixtures_are_not() -> None:
    assert are_exact({"cpu-fp32 AVX2 1"})
    assert are_exact({"cpu-bf16 AVX2 1"})
    assert not are_exact({"plain-cuda-fp32 NVIDIA H100 1"})
    assert not are_exact({"cuda-fp32 another card 1"})
    assert not are_exact({"cpu-fp32 AVX2 1", "cpu-fp32 AVX2 2"})
    assert not are_exact({"cpu-fp32 AVX2 1", "cpu-bf16 AVX2 1"})


# The suite notices: the same functions find what breaks the promise.


@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"), reason="not known whether they are guilty"
)
def test_the_suite_notices_plain_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariant, "linear", functional.linear)  # which takes no weights that are packed
    assert changed_by_steps(random_model(PLAIN), [300, 20, 3], chunks=[1, 9, 70], seed=3) > 0


def test_the_suite_notices_attention_that_depends_on_how_many_blocks_there_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attention = invariant.causal_attention

    def bent(q_NKMd: Tensor, k_NBKSd: Tensor, *others: Any) -> Tensor:
        mixed = attention(q_NKMd, k_NBKSd, *others)
        return torch.nextafter(mixed, torch.tensor(torch.inf)) if k_NBKSd.shape[1] > 1 else mixed

    monkeypatch.setattr(invariant, "causal_attention", bent)
    assert changed_by_steps(full_model("grouped"), [300, 20, 3], chunks=[1, 9, 70], seed=3) > 0


def test_the_suite_notices_a_key_at_a_wrong_place(monkeypatch: pytest.MonkeyPatch) -> None:
    write = KeyValueCache.write

    def late(cache: KeyValueCache, layer: int, place_R: Tensor, k_TKd: Tensor, v_TKv: Tensor) -> None:
        write(cache, layer, place_R, k_TKd, v_TKv)
        cache._keys[layer].view(-1, k_TKd.shape[2])[place_R[-1]] = 0  # the last row of a step is forgotten

    monkeypatch.setattr(KeyValueCache, "write", late)
    assert changed_by_steps(full_model("grouped"), [30], chunks=[10]) > 0


# Blocks, tiles, memory


def test_a_rows_logits_depend_on_all_before_it_and_on_nothing_behind_it() -> None:
    for name in ("grouped", "latent", "dense layers"):
        model = full_model(name)
        (ids_T,) = texts([200])
        before = whole_logits(model, ids_T)
        for place in (0, 63, 64, 127, 128, 199):
            other_T = ids_T.clone()
            other_T[place] = (other_T[place] + 1) % 89
            changed_T = (whole_logits(model, other_T) != before).any(dim=1)
            assert changed_T.nonzero()[:, 0].tolist() == list(range(place, 200))


@pytest.mark.parametrize("window", [1, 2, 5, 64, 127, 128, 129, 200])
def test_a_window_ends_where_it_should(window: int) -> None:
    attention = replace(PLAIN.attention, windows=(window,))
    model = arrange(random_model(replace(PLAIN, layers=1, attention=attention)))
    (ids_T,) = texts([300])
    before = whole_logits(model, ids_T)
    for place in (0, 1, 100, 127, 128, 170):
        other_T = ids_T.clone()
        other_T[place] = (other_T[place] + 1) % 89
        changed_T = (whole_logits(model, other_T) != before).any(dim=1)
        assert changed_T.nonzero()[:, 0].tolist() == list(range(place, min(300, place + window)))


def test_blocks_behind_a_window_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = KeyValueCache.view

    def counted(cache: KeyValueCache, layer: int, blocks: Sequence[Sequence[int]]) -> tuple[Picked, Picked]:
        read.append(len(blocks[0]))
        return original(cache, layer, blocks)

    monkeypatch.setattr(KeyValueCache, "view", counted)
    serving = Serving(full_model("alternating windows"), BLOCKS)
    (ids_T,) = texts([300])
    serving.step([(0, ids_T[:299])])
    read.clear()
    serving.step([(0, ids_T[299:])])
    assert read == [1, 3]


def test_what_is_hidden_may_hold_anything_finite() -> None:
    model = full_model("grouped")
    (ids_T,) = texts([70])
    wanted = whole_logits(model, ids_T)
    for stale in (0.0, 3e4, -3e4):
        serving = Serving(model, 1)
        for pool in serving.cache._keys + serving.cache._values:
            pool.fill_(stale)
        assert differing_rows(torch.cat(serving.step([(0, ids_T)])), wanted) == 0


@pytest.mark.parametrize("name", ["grouped", "alternating windows", "latent"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 3e38])
def test_no_sequence_meets_what_another_left_even_if_it_is_not_finite(name: str, poison: float) -> None:
    model = full_model(name)
    cache = KeyValueCache(model.spec, 4, CPU)
    leases = Leases(cache, model.rotary, model.spec.layers, lease_s=60.0)
    ill, well = b"i" * ID_BYTES, b"w" * ID_BYTES
    leases.open(ill, 0, 4 * BLOCK_TOKENS)
    for pool in cache._keys + cache._values:
        pool.fill_(poison)
    leases.release([ill])
    leases.open(well, 0, 300)
    (ids_T,) = texts([300])
    got = [
        model.rows(ids_T[at : at + rows], leases.rows([Place(well, 0, at, rows)]))
        for at, rows in ((0, 5), (5, 123), (128, 1), (129, 171))
    ]
    assert differing_rows(model.classifier(torch.cat(got)), whole_logits(model, ids_T)) == 0


def test_a_sequence_that_is_not_finite_leaves_its_mates_alone() -> None:
    model = full_model("grouped")
    cache = KeyValueCache(model.spec, 4, CPU)
    ill, well = Span((0, 1, 2), 0, 300), Span((3,), 0, 300 % TILE_ROWS)  # so that their last tiles share a batch
    (ids_T,) = texts([well.rows], seed=2)
    x_TD = model.embedding(torch.cat([*texts([300]), ids_T]), CachedSequences([ill, well], cache, model.rotary, CPU))
    alone = model.gating[0](x_TD[300:], CachedSequences([well], cache, model.rotary, CPU))
    x_TD[:300] = float("nan")
    together = model.gating[0](x_TD, CachedSequences([ill, well], cache, model.rotary, CPU))
    assert together.residual_TD[:300].isnan().all()
    assert differing_rows(together.residual_TD[300:], alone.residual_TD) == 0


def test_rows_that_are_put_again_late_leave_those_behind_them() -> None:
    model = full_model("grouped")
    leases = Leases(KeyValueCache(model.spec, 2, CPU), model.rotary, model.spec.layers, lease_s=60.0)
    leases.open(name := b"s" * ID_BYTES, 0, 60)
    (ids_T,) = texts([60])
    whole = whole_logits(model, ids_T)
    for at, rows in ((0, 20), (20, 20), (0, 20), (40, 20)):
        got = model.classifier(model.rows(ids_T[at : at + rows], leases.rows([Place(name, 0, at, rows)])))
        assert differing_rows(got, whole[at : at + rows]) == 0


def test_the_same_rows_may_be_computed_again() -> None:
    model = full_model("latent")
    (ids_T,) = texts([150])
    sequences = CachedSequences([Span((2, 0), 0, 150)], cache := KeyValueCache(model.spec, 3, CPU), model.rotary, CPU)
    first = model.rows(ids_T, sequences)
    again = CachedSequences([Span((2, 0), 140, 10)], cache, model.rotary, CPU)
    for _ in range(2):
        assert differing_rows(model.rows(ids_T[140:], again), first[140:]) == 0


@pytest.mark.parametrize(
    ("tokens", "blocks"), [(0, 0), (1, 1), (127, 1), (128, 1), (129, 2), (BLOCK_TOKENS * 3 + 1, 4)]
)
def test_blocks_of_tokens(tokens: int, blocks: int) -> None:
    assert blocks_of(tokens) == blocks


@pytest.mark.parametrize("name", ["grouped", "multi-query", "latent", "dense layers", "latent in bfloat16"])
def test_a_block_has_the_bytes_that_it_says(name: str) -> None:
    spec = SPECS[name]
    cache = KeyValueCache(spec, 3, CPU)
    held = sum(pool.numel() * pool.element_size() for pool in cache._keys + cache._values)
    assert held == 3 * KeyValueCache.block_bytes(spec)


def test_latent_attention_caches_one_row_a_token() -> None:
    row = LATENT.attention.latent_rank + 2 * len(LATENT.rotary.frequencies)
    assert KeyValueCache.block_bytes(LATENT) == LATENT.layers * BLOCK_TOKENS * row * 4
    grouped = 2 * PLAIN.attention.kv_heads * PLAIN.attention.head_width
    assert KeyValueCache.block_bytes(PLAIN) == PLAIN.layers * BLOCK_TOKENS * grouped * 4


def test_rows_stand_behind_what_is_cached() -> None:
    spans = [Span((5,), 3, 2), Span((1, 4), 127, 3), Span((0,), 0, 1)]
    model = full_model("grouped")
    sequences = CachedSequences(spans, KeyValueCache(model.spec, 6, CPU), model.rotary, CPU)
    assert sequences.positions_T.tolist() == [3, 4, 127, 128, 129, 0]
    assert sequences.lengths_B.tolist() == [2, 3, 1]
    heads = PLAIN.attention.kv_heads
    places = sequences._place_R[::heads]
    assert (places // (heads * BLOCK_TOKENS)).tolist() == [5, 5, 1, 4, 4, 0]
    assert (places % BLOCK_TOKENS).tolist() == [3, 4, 127, 0, 1, 0]


def test_tiles_are_short_and_cover_every_row_once() -> None:
    tiles = cut([Span((0, 1), 10, 150), Span((2,), 0, 1), Span((3,), 0, TILE_ROWS)])
    rows = np.concatenate([np.arange(tile.first_row, tile.first_row + tile.rows) for tile in tiles])
    assert rows.tolist() == list(range(150 + 1 + TILE_ROWS))
    assert [tile.rows for tile in tiles] == [64, 64, 22, 1, 64]
    assert [tile.position for tile in tiles] == [10, 74, 138, 0, 0]
