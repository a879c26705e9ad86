from __future__ import annotations

import numpy as np
import pytest

from expertmesh.v1.inspection_pb2 import InspectResponse, LayerTrace
from expertmesh.v1.tensor_pb2 import Tensor
from expertmesh.verification.sequences import logits_apart, singles
from expertmesh.verification.traces import bits_apart, differing_bits, first_difference
from expertmesh.wire import encode


def floats(*shape: int) -> Tensor:
    return encode(np.arange(np.prod(shape), dtype=np.float32).reshape(shape))


def trace() -> InspectResponse:
    """Three tokens in two chunks (of 2 and 1) through a dense layer and one with four experts."""
    dense = LayerTrace(input=floats(3, 2), residual=floats(3, 2))
    sparse = LayerTrace(
        input=floats(3, 2),
        residual=floats(3, 2),
        expert_input=floats(3, 2),
        expert_ids=encode(np.array([[0, 3], [1, 3], [1, 2]], np.int32)),
        weights=floats(3, 2),
        expert_rows=floats(6, 2),
        expert_counts=encode(np.array([1, 1, 0, 2, 0, 1, 1, 0], np.int32)),
    )
    return InspectResponse(
        ids=encode(np.zeros(3, np.int32)), embedded=floats(3, 2), layers=[dense, sparse], logits=floats(3, 5)
    )


def changed(tensor: Tensor, index: int) -> None:
    data = bytearray(tensor.data)
    data[index] ^= 5
    tensor.data = bytes(data)


def test_equal_traces_have_no_difference() -> None:
    assert differing_bits(trace(), trace()) == 0
    assert first_difference("x", trace(), trace(), 2).stage == ""


@pytest.mark.parametrize(("row", "expert"), [(0, 0), (1, 1), (2, 3), (3, 3), (4, 1), (5, 2)])
def test_the_expert_of_a_row_is_named_whatever_chunk_it_came_in(row: int, expert: int) -> None:
    other = trace()
    changed(other.layers[1].expert_rows, row * 8)
    assert str(first_difference("sequence 7", other, trace(), 2)) == f"sequence 7: expert {expert} of layer 1"
    assert differing_bits(other, trace()) == 2


@pytest.mark.parametrize(
    ("pick", "name"),
    [
        (lambda t: t.ids, "tokenizer"),
        (lambda t: t.embedded, "embedding"),
        (lambda t: t.layers[0].residual, "gating of layer 0"),
        (lambda t: t.layers[1].input, "combine of layer 0"),
        (lambda t: t.layers[1].expert_input, "gating of layer 1"),
        (lambda t: t.layers[1].expert_ids, "gating of layer 1"),
        (lambda t: t.layers[1].weights, "gating of layer 1"),
        (lambda t: t.logits, "classifier"),
    ],
)
def test_the_first_stage_that_differs_is_named(pick: object, name: str) -> None:
    other = trace()
    changed(pick(other), 1)  # type: ignore[operator]
    changed(other.logits, 0)
    assert str(first_difference("x", other, trace(), 2)) == f"x: {name}"
    assert differing_bits(other, trace()) == 4


def test_traces_of_other_shapes_differ() -> None:
    other = trace()
    other.logits.shape[:] = [5, 3]
    assert differing_bits(other, trace()) == 1
    del other.layers[1]
    assert differing_bits(other, trace()) > 0


def test_bits_are_counted() -> None:
    assert bits_apart(b"abc", b"abc") == 0
    assert bits_apart(b"\x00\xff", b"\x01\x0f") == 5
    assert bits_apart(b"ab", b"abcd") == 16


def test_logits_that_differ_in_the_sign_of_zero_differ() -> None:
    left, right = encode(np.zeros((1, 2), np.float32)), encode(np.array([[0.0, -0.0]], np.float32))
    assert logits_apart(left, right) == (1, 0.0)
    assert logits_apart(left, floats(1, 3))[1] == float("inf")
    assert logits_apart(floats(1, 3), encode(np.array([[0.0, 1.5, 2.0]], np.float32)))[1] == 0.5


def test_sequences_go_token_by_token_as_long_as_they_fit_and_one_does_anyway() -> None:
    sequences = [[0] * length for length in (5, 90, 3, 20, 2)]
    assert singles(sequences, 30) == {0, 2, 3, 4}
    assert singles(sequences, 10) == {0, 2, 4}
    assert singles(sequences, 1) == {4}
