from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from expertmesh.errors import CorruptReply, InvalidInput
from expertmesh.model.sampling import Draw, Sampling, Token, penalised, sample, survivors, uniform
from expertmesh.serving.sampling import decode_draws, encode_tokens
from expertmesh.v1 import classifier_pb2, sampling_pb2

VOCAB = 257
SMALLEST = float(np.finfo(np.float32).smallest_subnormal)
LARGEST = float(np.finfo(np.float32).max)

# key (seed, choice) and counter of the first four, which differ in one each, and of two others
GOLDEN = [
    0.011546754286331562,
    0.3035680343067586,
    0.8133540609793564,
    0.5023796042735054,
    0.5515714305450914,
    0.15506949934481895,
]
TOKENS = [198, 86, 218, 20, 251, 238, 205, 99, 152, 172, 165, 20]

some_examples = settings(max_examples=60, deadline=None, database=None)


@pytest.fixture(autouse=True)
def _threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_logits(rows: int, vocab: int = VOCAB, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale


def row_of(*values: float) -> torch.Tensor:
    return torch.tensor([values])


def one(logits_1V: torch.Tensor, sampling: Sampling, **fields: object) -> Token:
    [token] = sample(logits_1V, [Draw(sampling, **fields)])  # type: ignore[arg-type]
    return token


def alive(logits_1V: torch.Tensor, sampling: Sampling) -> list[int]:
    return survivors(logits_1V[0].numpy(), sampling)[0].tolist()


# A token depends on its own row and draw and on nothing else.

samplings = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 7, 50, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.4, 1e-3]),
    min_p=st.sampled_from([0.0, 0.05, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    seed=st.integers(0, 2**64 - 1),
)
draws = st.builds(
    Draw,
    sampling=samplings,
    choice=st.integers(0, 15),
    position=st.integers(0, 2**31 - 1),
    seen=st.lists(st.integers(0, VOCAB - 1), max_size=20),
    logprobs=st.integers(-1, 20),
)


@some_examples
@given(
    draws=st.lists(draws, min_size=1, max_size=12),
    seed=st.integers(0, 2**32 - 1),
    threads=st.sampled_from([1, 2]),
    offset=st.integers(0, 17),
)
def test_a_token_does_not_depend_on_its_company(draws: list[Draw], seed: int, threads: int, offset: int) -> None:
    torch.set_num_threads(threads)
    logits_BV = random_logits(len(draws), seed=seed)
    alone = [sample(logits_BV[row : row + 1].clone(), [draw])[0] for row, draw in enumerate(draws)]
    order = torch.randperm(len(draws), generator=torch.Generator().manual_seed(seed)).tolist()
    shifted = torch.empty(offset + logits_BV.numel())[offset:].view_as(logits_BV).copy_(logits_BV[order])
    assert sample(shifted, [draws[row] for row in order]) == [alone[row] for row in order]
    columns = logits_BV.T.contiguous().T  # the same values, laid out the other way
    assert sample(columns, draws) == alone


def test_a_draw_is_its_seed_choice_and_position() -> None:
    logits_1V = random_logits(1)
    drawn = {
        (seed, choice, position): one(logits_1V, Sampling(seed=seed), choice=choice, position=position).id
        for seed in range(6)
        for choice in range(6)
        for position in range(6)
    }
    for fixed in range(3):  # each of the three matters
        assert len({token for key, token in drawn.items() if key[:fixed] + key[fixed + 1 :] == (1, 2)}) > 1


def test_the_random_numbers_never_change() -> None:
    assert [uniform(0, 0, 0), uniform(1, 0, 0), uniform(0, 1, 0), uniform(0, 0, 1)] == GOLDEN[:4]
    assert [uniform(2**64 - 1, 15, 2**31 - 1), uniform(1234567890123456789, 3, 4096)] == GOLDEN[4:]


def test_the_tokens_of_a_seed_never_change() -> None:
    logits_1V = (torch.arange(VOCAB) * 7919 % 1009)[None].float() / 128
    sampling = Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=42)
    assert [one(logits_1V, sampling, position=position, seen=[9, 30]).id for position in range(12)] == TOKENS


def test_random_numbers_are_uniform() -> None:
    numbers = np.array([uniform(7, 0, position) for position in range(20_000)])
    counts, _ = np.histogram(numbers, 20, (0, 1))
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert ((counts - 1000) ** 2 / 1000).sum() < 43.8  # chi-square, 19 degrees of freedom, one in a thousand


def test_tokens_come_as_often_as_they_are_likely() -> None:
    logits_1V = row_of(0.0, math.log(2), -1000.0, math.log(5))
    tokens = [one(logits_1V, Sampling(seed=3), position=position).id for position in range(8000)]
    counts = np.bincount(tokens, minlength=4)
    assert counts[2] == 0
    assert np.abs(counts - np.array([1000, 2000, 0, 5000])).max() < 150


# What is left to draw from.


@pytest.mark.parametrize("temperature", [0.2, 1.0, 3.0])
@pytest.mark.parametrize("top_k", [0, 1, 20, VOCAB - 1, VOCAB, 10 * VOCAB])
@pytest.mark.parametrize(("top_p", "min_p"), [(1, 0), (0.9, 0), (0.05, 0), (1e-6, 0), (1, 0.1), (1, 1), (0.8, 0.02)])
@pytest.mark.parametrize("penalty", [1.0, 1.5, 0.5])
def test_the_same_tokens_survive_as_in_transformers(
    temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    steps = LogitsProcessorList()
    if penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(penalty))
    steps.append(TemperatureLogitsWarper(temperature))
    if top_k:
        steps.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        steps.append(TopPLogitsWarper(top_p))
    if min_p:
        steps.append(MinPLogitsWarper(min_p))
    sampling = Sampling(temperature, top_k, top_p, min_p, penalty)
    seen = [3, 5, 5, 3, 250, 0]
    for seed in range(4):
        logits_1V = random_logits(1, seed=seed)
        expected = steps(torch.tensor([seen]), logits_1V.double())[0].softmax(0)
        row_V = penalised(logits_1V[0].numpy(), Draw(sampling, seen=seen))
        ids_N, weights_N = survivors(row_V, sampling)
        assert ids_N.tolist() == torch.nonzero(expected)[:, 0].tolist()
        np.testing.assert_allclose(weights_N / weights_N.sum(), expected[expected > 0].numpy(), rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 8.0])
@pytest.mark.parametrize("top_p", [0.3, 0.99])
def test_top_p_of_a_large_vocabulary_is_that_of_sorting_it(temperature: float, top_p: float) -> None:
    row_V = random_logits(1, 40_000, seed=5)[0].numpy()
    probabilities = np.exp(row_V.astype(np.float64) / temperature)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities, kind="stable")
    needed = int(np.searchsorted(np.cumsum(probabilities[order]), top_p)) + 1
    ids_N, _ = survivors(row_V, Sampling(temperature, top_p=top_p))
    assert ids_N.tolist() == sorted(order[:needed].tolist())


def test_of_equal_scores_the_lower_ids_stay() -> None:
    level = torch.zeros(1, 10)
    assert alive(level, Sampling(top_k=3)) == [0, 1, 2]
    assert alive(level, Sampling(top_p=0.35)) == [0, 1, 2, 3]
    assert alive(level, Sampling(top_p=0.5, top_k=4)) == [0, 1]
    assert alive(level, Sampling(min_p=1)) == list(range(10))
    assert alive(row_of(0, 2, 1, 2, 1, 1), Sampling(top_k=4)) == [1, 2, 3, 4]
    assert one(row_of(0, 2, 1, 2), Sampling(0)).id == 1
    thirds = torch.arange(2000)[None] % 3 * 0.004  # many, and close: a sort that does not keep their order shows
    best, next_best = list(range(2, 2000, 3)), list(range(1, 2000, 3))
    assert alive(thirds, Sampling(top_k=700)) == sorted(best + next_best[: 700 - len(best)])
    half = alive(thirds, Sampling(top_p=0.5))
    assert len(best) < len(half) < 1000
    assert half == sorted(best + next_best[: len(half) - len(best)])


@pytest.mark.parametrize(("number", "expected"), [(0.0, 1), (0.25, 2), (0.5, 3), (0.75, 4), (1 - 2.0**-53, 4)])
def test_a_token_has_its_lower_bound_and_not_its_upper(
    number: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("expertmesh.model.sampling.uniform", lambda seed, choice, position: number)
    assert one(row_of(-1000, 0, 0, 0, 0, -1000), Sampling()).id == expected


def test_steps_see_what_the_step_before_has_left() -> None:
    logits_1V = torch.log(torch.tensor([[0.4, 0.3, 0.2, 0.1]]))
    assert alive(logits_1V, Sampling(top_p=0.65)) == [0, 1]
    assert alive(logits_1V, Sampling(top_k=2, top_p=0.55)) == [0]  # 0.4 of 0.7
    assert alive(logits_1V, Sampling(min_p=0.45)) == [0, 1, 2]
    assert alive(logits_1V, Sampling(min_p=0.55)) == [0, 1]


def test_greedy_takes_the_likeliest_after_the_penalty() -> None:
    logits_1V = row_of(1.0, 3.0, 2.9, -1.0)
    assert one(logits_1V, Sampling(0, top_k=4, top_p=0.1, min_p=1)).id == 1
    assert one(logits_1V, Sampling(0, repetition_penalty=1.2), seen=[1]).id == 2
    assert one(logits_1V, Sampling(0, repetition_penalty=1.2)).id == 1
    assert one(row_of(-1.0, -1.1), Sampling(0, repetition_penalty=1.2), seen=[0, 0, 0]).id == 1
    assert one(row_of(-1.0, -1.5), Sampling(0, repetition_penalty=1.2), seen=[0, 0, 0]).id == 0  # once, not thrice


@pytest.mark.parametrize("temperature", [SMALLEST, 1e-30, 100.0])
@pytest.mark.parametrize("penalty", [SMALLEST, 1.0, 100.0])
def test_extremes_give_a_token(temperature: float, penalty: float) -> None:
    logits_1V = row_of(LARGEST, -LARGEST, 0.0, LARGEST / 2)
    sampling = Sampling(temperature, 2, 0.5, 0.5, penalty)
    token = one(logits_1V, sampling, seen=[3, 1], logprobs=4)
    assert token.id in (0, 3)
    assert [id_of_token for id_of_token, _ in token.top] == [0, 3, 2, 1]
    assert all(math.isfinite(logprob) for _, logprob in token.top)


def test_a_vocabulary_of_one() -> None:
    assert one(row_of(-3.0), Sampling(1, 5, 0.1, 1), logprobs=20) == Token(0, 0.0, [(0, 0.0)])


# Log probabilities are the model's own.


def test_log_probabilities_are_those_before_all_steps() -> None:
    logits_1V = random_logits(1)
    expected_V = torch.log_softmax(logits_1V.double(), -1)[0]
    token = one(logits_1V, Sampling(2.0, 3, 0.9, 0.1, 1.7, 5), seen=[1, 2, 3], logprobs=20)
    assert token.logprob == pytest.approx(float(expected_V[token.id]), rel=1e-12)
    top = torch.topk(expected_V, 20)
    assert [id_of_token for id_of_token, _ in token.top] == top.indices.tolist()
    np.testing.assert_allclose([logprob for _, logprob in token.top], top.values.numpy(), rtol=1e-12)


def test_log_probabilities_that_were_asked_for() -> None:
    logits_1V = row_of(1, 3, 3, 2)
    assert one(logits_1V, Sampling(0)) == Token(1, 0.0, [])
    alone = one(logits_1V, Sampling(0), logprobs=0)
    assert alone.top == []
    assert alone.logprob < -0.5
    assert [id_of_token for id_of_token, _ in one(logits_1V, Sampling(0), logprobs=2).top] == [1, 2]
    assert [id_of_token for id_of_token, _ in one(logits_1V, Sampling(0), logprobs=20).top] == [1, 2, 3, 0]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_give_no_token(value: float, temperature: float) -> None:
    logits_BV = random_logits(3)
    logits_BV[1, 77] = value
    with pytest.raises(CorruptReply, match="row 1"):
        sample(logits_BV, [Draw(Sampling(temperature))] * 3)


def test_half_precision_logits_are_widened() -> None:
    logits_BV = random_logits(2).bfloat16()
    draws = [Draw(Sampling(seed=1), logprobs=3), Draw(Sampling(0), logprobs=3)]
    assert sample(logits_BV, draws) == sample(logits_BV.float(), draws)


# The messages.


def message(logprobs: int = -1, **fields: float) -> classifier_pb2.Draw:
    plain = {"temperature": 1, "top_p": 1, "repetition_penalty": 1}
    return classifier_pb2.Draw(sampling=sampling_pb2.Sampling(**{**plain, **fields}), logprobs=logprobs)  # type: ignore[arg-type]


def test_a_draw_is_read() -> None:
    sent = message(20, temperature=0.5, top_k=3, top_p=0.25, min_p=0.125, repetition_penalty=2, seed=2**64 - 1)
    sent.choice, sent.position = 15, 2**31 - 1
    sent.seen.extend([0, 9, 9])
    [draw] = decode_draws([sent], 1, 10)
    assert draw == Draw(Sampling(0.5, 3, 0.25, 0.125, 2, 2**64 - 1), 15, 2**31 - 1, [0, 9, 9], 20)


def test_tokens_are_written() -> None:
    reply = encode_tokens([Token(3, -0.5, [(3, -0.5), (1, -2.0)]), Token(1, 0.0, [])])
    assert [token.id for token in reply.tokens] == [3, 1]
    assert reply.tokens[0].logprob == -0.5
    assert [(entry.id, entry.logprob) for entry in reply.tokens[0].top] == [(3, -0.5), (1, -2.0)]


BAD_SAMPLING = {
    "temperature": [math.nan, math.inf, -math.inf, -SMALLEST, 100.001],
    "top_k": [-1, -(2**31)],
    "top_p": [math.nan, 0, -0.5, 1.001, math.inf],
    "min_p": [math.nan, -SMALLEST, 1.001],
    "repetition_penalty": [math.nan, 0, -1, 100.001, math.inf],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field in BAD_SAMPLING for value in BAD_SAMPLING[field]]
)
def test_sampling_out_of_its_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_draws([message(), message(**{field: value})], 2, 10)
    assert caught.value.field == f"draws[1].sampling.{field}"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("choice", value) for value in (-1, 16, 2**31 - 1)),
        *(("position", value) for value in (-1, -(2**31))),
        *(("logprobs", value) for value in (-2, 21)),
        *(("seen", value) for value in ([-1], [3, 10], [0, 2**31 - 1])),
    ],
)
def test_a_draw_out_of_its_range_is_refused(field: str, value: object) -> None:
    plain = {"sampling": message().sampling, field: value}
    with pytest.raises(InvalidInput) as caught:
        decode_draws([classifier_pb2.Draw(**plain)], 1, 10)  # type: ignore[arg-type]
    assert caught.value.field == f"draws[0].{field}"


@pytest.mark.parametrize("count", [0, 1, 3])
def test_draws_that_are_not_as_many_as_rows_are_refused(count: int) -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_draws([message()] * count, 2, 10)
    assert caught.value.field == "draws"


def test_a_draw_without_sampling_is_refused() -> None:
    with pytest.raises(InvalidInput) as caught:
        decode_draws([classifier_pb2.Draw(logprobs=-1)], 1, 10)
    assert caught.value.field == "draws[0].sampling.top_p"
