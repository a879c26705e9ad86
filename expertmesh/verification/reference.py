"""What another implementation computed for some token ids, in a NumPy archive.

The arrays, for B sequences of T tokens without padding and a model of L layers, width D and vocabulary V:

    input_ids        [B, T]          token ids
    logits           [B, T, V]       of the next token
    hidden_states    [L + 1, B, T, D] what each layer is given; the last entry is not looked at
    route_I_index    [B * T, K]      experts of each token in the I-th layer that has experts, in any order
    route_I_weight   [B * T, K]      their weights, in the same order
    generated        [B, T + G]      the ids, and G tokens generated greedily behind them

Other arrays are left alone. The file may come from anywhere: nothing in it is unpickled, and a member is read only when
its size is the one that its shape needs.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from expertmesh.errors import SetupError
from expertmesh.model.spec import ModelSpec

MAX_ARRAY_BYTES = 2**32
MAX_MEMBERS = 10_000
_HEADERS: dict[tuple[int, int], Callable[..., tuple[tuple[int, ...], bool, np.dtype[Any]]]] = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Route:
    """Where the tokens of all sequences went in one layer: experts in ascending order, and their weights."""

    experts_TK: Array
    weights_TK: Array


@dataclass(frozen=True)
class Reference:
    """The numbers.

    Attributes:
        ids_BT: Token ids.
        logits_BTV: In float32.
        hidden_LBTD: What each layer is given, in float32.
        routes: Of each layer that has experts.
        generated_BG: Greedy tokens behind the ids.
    """

    ids_BT: Array
    logits_BTV: Array
    hidden_LBTD: Array
    routes: list[Route]
    generated_BG: Array

    @classmethod
    def read(cls, path: Path, spec: ModelSpec) -> Reference:
        """Reads an archive.

        Raises:
            SetupError: It is missing, damaged, incomplete, or not of this model.
        """
        try:
            with zipfile.ZipFile(path) as archive:
                return cls._read(_Archive(archive, path), spec)
        except OSError as error:
            raise SetupError(f"{path} cannot be read: {error.strerror or error}") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
            raise SetupError(f"{path} is no NumPy archive, or damaged: {error}") from None

    @classmethod
    def _read(cls, archive: _Archive, spec: ModelSpec) -> Reference:
        ids_BT = archive.integers("input_ids", (None, None), spec.embedding.vocab)
        rows, length = ids_BT.shape
        if not 0 < length < spec.context or not rows:
            raise archive.error(f"input_ids are {rows} sequences of {length} tokens; the context is {spec.context}")
        generated = archive.integers("generated", (rows, None), spec.embedding.vocab)
        if not length < generated.shape[1] <= spec.context:
            raise archive.error(
                f"generated has {generated.shape[1]} tokens, not more than {length} and at most the context"
            )
        if not np.array_equal(generated[:, :length], ids_BT):
            raise archive.error("generated does not begin with input_ids")
        return cls(
            ids_BT,
            archive.numbers("logits", (rows, length, spec.embedding.vocab)),
            archive.numbers("hidden_states", (spec.layers + 1, rows, length, spec.width))[: spec.layers],
            [archive.route(number, rows * length, spec) for number in range(len(spec.sparse_layers))],
            generated[:, length:],
        )


class _Archive:
    """Reads members of an archive, each only if it is what is wanted."""

    def __init__(self, archive: zipfile.ZipFile, path: Path) -> None:
        self._archive = archive
        self._path = path
        if len(archive.infolist()) > MAX_MEMBERS:
            raise self.error(f"it has more than {MAX_MEMBERS} members")

    def error(self, message: str) -> SetupError:
        return SetupError(f"{self._path}: {message}")

    def integers(self, name: str, shape: tuple[int | None, ...], limit: int) -> Array:
        """Integers in [0, limit)."""
        array = self._read(name, "iu", "integers", shape)
        if array.size and not 0 <= array.min() <= array.max() < limit:
            raise self.error(f"{name} must be in [0, {limit})")
        return array.astype(np.int64)

    def numbers(self, name: str, shape: tuple[int, ...]) -> Array:
        """Finite numbers, in float32."""
        array = self._read(name, "f", "floating-point numbers", shape).astype(np.float32)
        if not np.isfinite(array).all():
            raise self.error(f"{name} holds values that are not finite")
        return array

    def route(self, number: int, tokens: int, spec: ModelSpec) -> Route:
        shape = (tokens, spec.router.top_k)
        experts_TK = self.integers(f"route_{number}_index", shape, spec.router.experts)
        weights_TK = self.numbers(f"route_{number}_weight", shape)
        order_TK = np.argsort(experts_TK, axis=1, kind="stable")
        return Route(np.take_along_axis(experts_TK, order_TK, 1), np.take_along_axis(weights_TK, order_TK, 1))

    def _read(self, name: str, kinds: str, wanted: str, shape: tuple[int | None, ...]) -> Array:
        try:
            info = self._archive.getinfo(f"{name}.npy")
        except KeyError:
            raise self.error(f"there is no array {name}") from None
        with self._archive.open(info) as file:
            try:
                version = np.lib.format.read_magic(file)
                given, is_fortran, dtype = _HEADERS[version](file)
            except (ValueError, KeyError) as error:
                raise self.error(f"{name} is no NumPy array: {error}") from None
            if dtype.kind not in kinds:
                raise self.error(f"{name} must be {wanted}, not {dtype.name}")
            if len(given) != len(shape) or any(s not in (None, g) for s, g in zip(shape, given, strict=True)):
                needed = ", ".join("?" if size is None else str(size) for size in shape)
                raise self.error(f"{name} has shape {list(given)}, this model needs [{needed}]")
            size = math.prod(given) * dtype.itemsize
            if size > MAX_ARRAY_BYTES or info.file_size - file.tell() != size:
                raise self.error(f"{name} has {info.file_size} bytes, which is not what its shape {list(given)} needs")
            data = file.read(size)
        if len(data) != size:
            raise self.error(f"{name} ends after {len(data)} of {size} bytes")
        return np.frombuffer(data, dtype).reshape(given, order="F" if is_fortran else "C")
