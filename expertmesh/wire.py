"""Arrays on the wire: the `Tensor` message to and from numpy.

Everything about a message is checked against what the reader expects before anything is allocated.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from expertmesh.errors import InvalidInput, NonFiniteInput
from expertmesh.v1.tensor_pb2 import (
    DATA_TYPE_BFLOAT16,
    DATA_TYPE_FLOAT16,
    DATA_TYPE_FLOAT32,
    DATA_TYPE_INT32,
    DATA_TYPE_INT64,
    DataType,
    Tensor,
)

FLOAT32 = np.dtype("<f4")
INT32 = np.dtype("<i4")
INT64 = np.dtype("<i8")
FLOAT16 = np.dtype("<f2")
BFLOAT16 = np.dtype("V2")  # numpy has no bfloat16: two bytes that can be moved about, and be widened to float32
ROW_DTYPES: dict[str, np.dtype[Any]] = {"float32": FLOAT32, "float16": FLOAT16, "bfloat16": BFLOAT16}

_DTYPE2CODE: dict[np.dtype[Any], DataType] = {
    FLOAT32: DATA_TYPE_FLOAT32,
    INT32: DATA_TYPE_INT32,
    INT64: DATA_TYPE_INT64,
    FLOAT16: DATA_TYPE_FLOAT16,
    BFLOAT16: DATA_TYPE_BFLOAT16,
}
_CODE2DTYPE: dict[int, np.dtype[Any]] = {code: dtype for dtype, code in _DTYPE2CODE.items()}

AnyArray = npt.NDArray[Any]


def encode(array: AnyArray) -> Tensor:
    """Writes an array of one of the dtypes above.

    Raises:
        KeyError: The dtype is none of these.
    """
    tensor = Tensor()
    fill(tensor, array)
    return tensor


def fill(tensor: Tensor, array: AnyArray) -> None:
    """The same into a tensor that is empty, such as one inside a message, where it needs no second copy.

    Raises:
        KeyError: The dtype is none of these.
    """
    code = _DTYPE2CODE.get(array.dtype)
    if code is None:  # of the other byte order, or none that travels
        code = _DTYPE2CODE[array.dtype.newbyteorder("<")]
        array = array.astype(array.dtype.newbyteorder("<"))
    tensor.dtype = code
    tensor.shape.extend(array.shape)
    tensor.data = array.tobytes()


def decode(tensor: Tensor, dtype: np.dtype[Any], shape: tuple[int | None, ...], name: str) -> AnyArray:
    """Reads an array as a read-only view of the message's bytes; its address need not be aligned.

    Args:
        tensor: The message.
        dtype: The only dtype that is accepted.
        shape: The expected shape; None stands for any size that is at least 1.
        name: What the caller calls it, for the error.

    Raises:
        InvalidInput: The dtype, the shape or the number of bytes is not as expected.
    """
    if _CODE2DTYPE.get(tensor.dtype) != dtype:
        raise InvalidInput(f"{name} must have dtype {_name(dtype)}", name)
    given = tuple(tensor.shape)
    if given != shape:
        fits = len(given) == len(shape) and all(
            size >= 1 if expected is None else size == expected for size, expected in zip(given, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("*" if size is None else str(size) for size in shape)
            raise InvalidInput(f"{name} must have shape [{wanted}], not {list(given)[:8]}", name)
    data = tensor.data
    if len(data) != prod(given) * dtype.itemsize:
        raise InvalidInput(f"{name} has {len(data)} bytes where its shape needs {prod(given) * dtype.itemsize}", name)
    return np.frombuffer(data, dtype=dtype).reshape(given)


def decode_finite(tensor: Tensor, shape: tuple[int | None, ...], name: str) -> AnyArray:
    """Reads a float32 array that may not hold NaN or infinity.

    Raises:
        InvalidInput: As `decode`.
        NonFiniteInput: A value is not finite.
    """
    array = decode(tensor, FLOAT32, shape, name)
    if not np.isfinite(array).all():
        raise NonFiniteInput(f"{name} holds values that are not finite", name)
    return array


def decode_rows(tensor: Tensor, shape: tuple[int | None, ...], name: str) -> AnyArray:
    """Reads an array of one of `ROW_DTYPES`, as it is, that may not hold NaN or infinity.

    Raises:
        InvalidInput: As `decode`.
        NonFiniteInput: A value is not finite.
    """
    dtype = _CODE2DTYPE.get(tensor.dtype)
    if dtype is None or dtype not in ROW_DTYPES.values():
        raise InvalidInput(f"{name} must have dtype {', '.join(ROW_DTYPES)}", name)
    array = decode(tensor, dtype, shape, name)
    if not _is_finite(array):
        raise NonFiniteInput(f"{name} holds values that are not finite", name)
    return array


def widen(rows: AnyArray) -> AnyArray:
    """Rows of any of `ROW_DTYPES` in float32, which holds them exactly."""
    if rows.dtype == BFLOAT16:
        return (rows.view("<u2").astype("<u4") << 16).view(FLOAT32)
    return rows.astype(FLOAT32, copy=False)


def narrow(rows: AnyArray, dtype: np.dtype[Any]) -> AnyArray:
    """Rows rounded to nearest even in another dtype; those that do not fit it stay as they are."""
    if rows.dtype == dtype:
        return rows
    wide = widen(rows)
    if dtype == BFLOAT16:
        bits = np.ascontiguousarray(wide).view("<u4")
        narrowed: AnyArray = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").view(BFLOAT16)
    else:
        with np.errstate(over="ignore"):
            narrowed = wide.astype(dtype)
    return narrowed if _is_finite(narrowed) else rows


def _is_finite(rows: AnyArray) -> bool:
    if rows.dtype == BFLOAT16:
        return not ((rows.view("<u2") & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(rows).all())


def _name(dtype: np.dtype[Any]) -> str:
    return "bfloat16" if dtype == BFLOAT16 else dtype.name


def decode_ids(tensor: Tensor, vocab: int, name: str = "ids") -> AnyArray:
    """Reads token ids, int32 [T].

    Raises:
        InvalidInput: As `decode`, or an id is not in [0, vocab).
    """
    ids_T = decode(tensor, INT32, (None,), name)
    if ids_T.min() < 0 or ids_T.max() >= vocab:
        raise InvalidInput(f"every id must be in [0, {vocab})", name)
    return ids_T


def decode_lengths(tensor: Tensor, rows: int, context: int, name: str = "lengths") -> AnyArray:
    """Reads the lengths of the sequences that make up `rows` token rows.

    Raises:
        InvalidInput: A length is not in [1, context], or they do not sum to `rows`.
    """
    lengths_B = decode(tensor, INT32, (None,), name)
    if lengths_B.min() < 1 or lengths_B.max() > context:
        raise InvalidInput(f"every length must be in [1, {context}]", name)
    if int(lengths_B.sum(dtype=np.int64)) != rows:
        raise InvalidInput(f"{name} must sum to the number of rows, {rows}", name)
    return lengths_B
