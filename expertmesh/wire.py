"""Arrays on the wire: the `Tensor` message to and from numpy.

Everything about a message is checked against what the reader expects before anything is allocated.
"""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from expertmesh.errors import InvalidInput
from expertmesh.v1.tensor_pb2 import DATA_TYPE_FLOAT32, DATA_TYPE_INT32, DATA_TYPE_INT64, Tensor

FLOAT32 = np.dtype("<f4")
INT32 = np.dtype("<i4")
INT64 = np.dtype("<i8")

_DTYPE2CODE = {FLOAT32: DATA_TYPE_FLOAT32, INT32: DATA_TYPE_INT32, INT64: DATA_TYPE_INT64}
_CODE2DTYPE = {code: dtype for dtype, code in _DTYPE2CODE.items()}

AnyArray = npt.NDArray[Any]


def encode(array: AnyArray) -> Tensor:
    """Writes a float32, int32 or int64 array.

    Raises:
        KeyError: The dtype is none of these.
    """
    code = _DTYPE2CODE[array.dtype.newbyteorder("<")]
    data = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<")).tobytes()
    return Tensor(dtype=code, shape=array.shape, data=data)


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
        raise InvalidInput(f"{name} must have dtype {dtype.name}", name)
    given = tuple(tensor.shape)
    fits = len(given) == len(shape) and all(
        size >= 1 if expected is None else size == expected for size, expected in zip(given, shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("*" if size is None else str(size) for size in shape)
        raise InvalidInput(f"{name} must have shape [{wanted}], not {list(given)[:8]}", name)
    if len(tensor.data) != prod(given) * dtype.itemsize:
        raise InvalidInput(
            f"{name} has {len(tensor.data)} bytes where its shape needs {prod(given) * dtype.itemsize}", name
        )
    return np.frombuffer(tensor.data, dtype=dtype).reshape(given)


def decode_finite(tensor: Tensor, shape: tuple[int | None, ...], name: str) -> AnyArray:
    """Reads a float32 array that may not hold NaN or infinity.

    Raises:
        InvalidInput: As `decode`, or a value is not finite.
    """
    array = decode(tensor, FLOAT32, shape, name)
    if not np.isfinite(array).all():
        raise InvalidInput(f"{name} holds values that are not finite", name)
    return array


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
