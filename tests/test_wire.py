from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from expertmesh import wire
from expertmesh.errors import InvalidInput
from expertmesh.model.arrays import to_numpy, to_torch
from expertmesh.v1.tensor_pb2 import DATA_TYPE_FLOAT32, DATA_TYPE_INT32, DATA_TYPE_INT64, DATA_TYPE_UNSPECIFIED, Tensor

DTYPES = (wire.FLOAT32, wire.INT32, wire.INT64)
ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)


def tensor(shape: tuple[int, ...], data: bytes, dtype: int = DATA_TYPE_FLOAT32) -> Tensor:
    return Tensor(dtype=dtype, shape=shape, data=data)


@given(st.data())
def test_what_is_written_is_read_bit_for_bit(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    array = data.draw(hnp.arrays(dtype, hnp.array_shapes(min_dims=1, max_dims=3, max_side=7)))
    message = Tensor.FromString(wire.encode(array).SerializeToString())
    read = wire.decode(message, dtype, array.shape, "x")
    assert read.dtype == dtype
    assert read.shape == array.shape
    assert read.tobytes() == array.tobytes()
    assert wire.decode(message, dtype, (None,) * array.ndim, "x").shape == array.shape


def test_bytes_are_little_endian_and_row_major_whatever_the_array_was() -> None:
    expected = ROWS.astype("<f4").tobytes()
    assert wire.encode(ROWS.astype(">f4")).data == expected
    assert wire.encode(np.asfortranarray(ROWS)).data == expected
    assert wire.encode(np.repeat(ROWS, 2, axis=1)[:, ::2]).data == expected
    assert list(wire.encode(ROWS[::2]).shape) == [2, 4]


@pytest.mark.parametrize("dtype", ["f8", "i2", "u4", "?", "c8", "O"])
def test_other_dtypes_are_not_written(dtype: str) -> None:
    with pytest.raises(KeyError):
        wire.encode(np.zeros(2, dtype))


def test_what_is_read_cannot_be_written_to() -> None:
    read = wire.decode(wire.encode(ROWS), wire.FLOAT32, (3, 4), "rows")
    with pytest.raises(ValueError, match="read-only"):
        read[0, 0] = 1


@pytest.mark.parametrize("code", [DATA_TYPE_UNSPECIFIED, DATA_TYPE_INT32, DATA_TYPE_INT64, 17, -1, 2**31 - 1])
def test_another_dtype_is_refused(code: int) -> None:
    with pytest.raises(InvalidInput, match="rows must have dtype float32") as caught:
        wire.decode(tensor((3, 4), ROWS.tobytes(), code), wire.FLOAT32, (3, 4), "rows")
    assert caught.value.field == "rows"


@given(st.binary(max_size=64).filter(lambda data: len(data) != 48))
def test_bytes_must_be_as_many_as_the_shape_needs(data: bytes) -> None:
    with pytest.raises(InvalidInput, match=f"rows has {len(data)} bytes where its shape needs 48"):
        wire.decode(tensor((3, 4), data), wire.FLOAT32, (None, 4), "rows")


@pytest.mark.parametrize("shape", [(), (12,), (3, 4, 1), (1, 3, 4), (3, 5), (4, 3), (2, 4), (3, 0), (3, -4)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInput, match="rows must have shape \\[3, 4\\]"):
        wire.decode(tensor(shape, ROWS.tobytes()), wire.FLOAT32, (3, 4), "rows")


@pytest.mark.parametrize("size", [0, -1, -(2**63)])
def test_a_free_dimension_is_at_least_one(size: int) -> None:
    with pytest.raises(InvalidInput, match="must have shape"):
        wire.decode(tensor((size, 4), b""), wire.FLOAT32, (None, 4), "rows")


@pytest.mark.parametrize("shape", [(2**62, 8), (2**32, 2**32), (2**63 - 1, 2**63 - 1), (2**61, 4)])
@pytest.mark.parametrize("data", [b"", bytes(32)])
def test_a_shape_that_overflows_is_refused(shape: tuple[int, int], data: bytes) -> None:
    with pytest.raises(InvalidInput, match="bytes where its shape needs"):
        wire.decode(tensor(shape, data), wire.FLOAT32, (None, None), "rows")


def test_two_negative_dimensions_do_not_make_a_positive_size() -> None:
    with pytest.raises(InvalidInput, match="must have shape"):
        wire.decode(tensor((-3, -4), ROWS.tobytes()), wire.FLOAT32, (None, None), "rows")


def test_a_declared_shape_costs_no_memory() -> None:
    claims_a_gibibyte = tensor((2**18, 2**10), bytes(4))
    has_a_million_dimensions = tensor((1,) * 100_000, bytes(4))
    tracemalloc.start()
    try:
        for message in (claims_a_gibibyte, has_a_million_dimensions):
            with pytest.raises(InvalidInput) as caught:
                wire.decode_finite(message, (None, 2**10), "rows")
            assert len(str(caught.value)) < 200
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


def test_an_expected_size_of_zero_is_read() -> None:
    empty = np.empty(0, np.int32)
    assert wire.decode(wire.encode(empty), wire.INT32, (0,), "ids").shape == (0,)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 5, 11])
def test_rows_must_be_finite(value: float, place: int) -> None:
    rows = ROWS.copy()
    rows.flat[place] = value
    with pytest.raises(InvalidInput, match="rows holds values that are not finite") as caught:
        wire.decode_finite(wire.encode(rows), (None, 4), "rows")
    assert caught.value.field == "rows"


def test_extreme_but_finite_rows_are_read() -> None:
    limits = np.finfo(np.float32)
    rows = np.array([[limits.max, limits.min, limits.smallest_subnormal, -0.0]], np.float32)
    assert wire.decode_finite(wire.encode(rows), (None, 4), "rows").tobytes() == rows.tobytes()


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20))
def test_lengths_that_sum_are_read(lengths: list[int]) -> None:
    message = wire.encode(np.array(lengths, np.int32))
    assert wire.decode_lengths(message, sum(lengths), 9).tolist() == lengths


@pytest.mark.parametrize(
    ("lengths", "rows", "reason"),
    [
        ([0, 3], 3, "every length"),
        ([-1, 4], 3, "every length"),
        ([10], 10, "every length"),
        ([3, 3], 5, "sum"),
        ([3, 3], 7, "sum"),
        ([2**31 - 1] * 3, 3, "every length"),
    ],
)
def test_lengths_that_cannot_be_are_refused(lengths: list[int], rows: int, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason) as caught:
        wire.decode_lengths(wire.encode(np.array(lengths, np.int32)), rows, 9)
    assert caught.value.field == "lengths"


def test_lengths_are_summed_without_overflow() -> None:
    # As int32 this sums to 2: 2 * 2^31 + 2 modulo 2^32.
    lengths = np.array([2**31 - 1, 2**31 - 1, 4], np.int32)
    with pytest.raises(InvalidInput, match="sum"):
        wire.decode_lengths(wire.encode(lengths), 2, 2**31 - 1)


def test_no_lengths_are_refused() -> None:
    with pytest.raises(InvalidInput, match="lengths must have shape"):
        wire.decode_lengths(wire.encode(np.empty(0, np.int32)), 3, 9)


# Rows of other dtypes. Torch is what narrower rows are compared with.

FLOATS = hnp.arrays(np.float32, st.integers(1, 40), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
ROW_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def as_torch(array: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """What torch rounds float32 to, in float32."""
    return torch.from_numpy(array.copy()).to(dtype).float().numpy()


@pytest.mark.parametrize("name", ROW_DTYPES)
@given(array=FLOATS)
@example(array=np.array([1.0, -0.0, 1e-45, 65504.0, 1 + 2**-8, 1 + 3 * 2**-8, 3.38e38], np.float32))
def test_narrow_rows_are_what_torch_rounds_to(name: str, array: np.ndarray) -> None:
    expected = as_torch(array, ROW_DTYPES[name])
    narrowed = wire.narrow(array, wire.ROW_DTYPES[name])
    if np.isfinite(expected).all():
        assert narrowed.dtype == wire.ROW_DTYPES[name]
        assert wire.widen(narrowed).tobytes() == expected.tobytes()
    else:
        assert narrowed is array


@pytest.mark.parametrize("name", ROW_DTYPES)
@given(bits=hnp.arrays(np.uint16, st.integers(1, 40)))
def test_all_narrow_numbers_are_held_exactly(name: str, bits: np.ndarray) -> None:
    narrow = bits.view(wire.ROW_DTYPES[name])
    expected = torch.from_numpy(bits.view(np.int16).copy()).view(ROW_DTYPES[name]).float().numpy()
    finite = np.isfinite(expected)
    wide = wire.widen(narrow)
    assert wide.dtype == wire.FLOAT32
    assert wide[finite].tobytes() == expected[finite].tobytes()
    if finite.all():
        assert wire.narrow(wide, narrow.dtype).tobytes() == narrow.tobytes()
        message = Tensor.FromString(wire.encode(narrow).SerializeToString())
        assert wire.decode_rows(message, (len(bits),), "rows").tobytes() == bits.tobytes()
    else:
        with pytest.raises(InvalidInput, match="not finite"):
            wire.decode_rows(wire.encode(narrow), (len(bits),), "rows")


@pytest.mark.parametrize("name", ROW_DTYPES)
def test_one_number_that_does_not_fit_leaves_all_rows_as_they_are(name: str) -> None:
    rows = ROWS.copy()
    rows[1, 2] = np.finfo(np.float32).max
    assert wire.narrow(rows, wire.ROW_DTYPES[name]) is rows
    assert wire.encode(wire.narrow(rows, wire.ROW_DTYPES[name])).dtype == DATA_TYPE_FLOAT32


def test_bfloat16_becomes_float16_where_it_fits() -> None:
    small = wire.narrow(ROWS, wire.BFLOAT16)
    assert wire.narrow(small, wire.FLOAT16).tobytes() == ROWS.astype(np.float16).tobytes()
    large = wire.narrow(ROWS + np.float32(1e5), wire.BFLOAT16)
    assert wire.narrow(large, wire.FLOAT16) is large


@pytest.mark.parametrize("name", wire.ROW_DTYPES)
def test_what_has_its_dtype_is_not_touched(name: str) -> None:
    rows = wire.narrow(ROWS, wire.ROW_DTYPES[name])
    assert wire.narrow(rows, rows.dtype) is rows


@pytest.mark.parametrize("name", wire.ROW_DTYPES)
def test_numpy_and_torch_hold_the_same_rows(name: str) -> None:
    rows = wire.narrow(ROWS, wire.ROW_DTYPES[name])
    read = wire.decode_rows(wire.encode(rows), ROWS.shape, "rows")  # an address that may be odd
    tensor = to_torch(read, torch.device("cpu"))
    assert tensor.dtype == {"float32": torch.float32, **ROW_DTYPES}[name]
    assert (tensor.float().numpy() == ROWS).all()
    assert to_numpy(tensor).dtype == rows.dtype
    assert to_numpy(tensor.T.contiguous().T).tobytes() == rows.tobytes()


@pytest.mark.parametrize("dtype", [wire.INT32, wire.INT64])
def test_rows_are_floating_point(dtype: np.dtype) -> None:
    with pytest.raises(InvalidInput, match="float32, float16, bfloat16"):
        wire.decode_rows(wire.encode(ROWS.astype(dtype)), ROWS.shape, "rows")


@pytest.mark.parametrize("name", ROW_DTYPES)
def test_narrow_rows_are_not_taken_for_float32(name: str) -> None:
    message = wire.encode(wire.narrow(ROWS, wire.ROW_DTYPES[name]))
    with pytest.raises(InvalidInput, match="must have dtype float32"):
        wire.decode_finite(message, ROWS.shape, "rows")
    with pytest.raises(InvalidInput, match="23 bytes where its shape needs 24"):
        wire.decode_rows(tensor((3, 4), message.data[:-1], message.dtype), (3, 4), "rows")
