"""Who may use which blocks of a KV cache.

A sequence is opened with the most tokens it will ever have and gets all its blocks at once: what was admitted can never
run out of memory later. It keeps them until it is released, or until nothing was heard of it for a while.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from expertmesh.errors import InvalidInput, Overloaded, WrongPart
from expertmesh.model.cache import BLOCK_TOKENS, KeyValueCache, blocks_of
from expertmesh.model.cached_sequences import CachedSequences
from expertmesh.model.rotary import Rotary
from expertmesh.model.tiles import Span
from expertmesh.telemetry import metrics

ID_BYTES = 16
RETRY_AFTER_S = 0.1
LAYOUTS = 4  # steps that may go through the layers at one time without building their layout for every layer
LAYOUT_ROWS = 64  # most rows of a layout that is kept; of many, computing takes long and a layout much memory


@dataclass(frozen=True)
class Place:
    """Where rows of one sequence belong.

    Attributes:
        sequence: Its id.
        epoch: Grows each time the sequence is computed anew.
        position: Tokens that stand before these rows.
        rows: How many rows.
    """

    sequence: bytes
    epoch: int
    position: int
    rows: int


@dataclass
class _Lease:
    epoch: int
    tokens: int
    blocks: list[int]
    layer2cached: list[int]
    heard_s: float = field(default=0.0)


class Leases:
    """The blocks of one cache and the sequences that hold them.

    Args:
        cache: The blocks.
        rotary: Of the model.
        layers: Of the model.
        lease_s: How long a sequence may be silent before it is forgotten.
        clock: Tells the time, in seconds.
        context: Most tokens of a sequence.
    """

    def __init__(
        self,
        cache: KeyValueCache,
        rotary: Rotary,
        layers: int,
        lease_s: float,
        clock: Callable[[], float] = time.monotonic,
        context: int = 2**31 - 1,
    ) -> None:
        self._cache = cache
        self._rotary = rotary
        self._layers = layers
        self._lease_s = lease_s
        self._clock = clock
        self._context = context
        self._free = list(range(cache.blocks))
        self._leases: dict[bytes, _Lease] = {}
        self._layouts: dict[object, CachedSequences] = {}  # the latest ones: the next layer's is one of them
        metrics.KV_BLOCKS.labels("total").set(cache.blocks)
        metrics.KV_BLOCKS.labels("used").set(0)

    @property
    def free_blocks(self) -> int:
        """Blocks that nobody holds."""
        return len(self._free)

    @property
    def is_empty(self) -> bool:
        """Whether nobody holds any."""
        return not self._leases

    def open(self, sequence: bytes, epoch: int, tokens: int) -> None:
        """Reserves room for a sequence.

        Opening it again with a higher epoch starts it anew; with the same epoch it is heard of, and
        gets more room if it asks for more.

        Raises:
            InvalidInput: The id is malformed, or it can never fit.
            WrongPart: It is open with a higher epoch.
            Overloaded: It does not fit just now.
        """
        if len(sequence) != ID_BYTES:
            raise InvalidInput(f"a sequence's id has {ID_BYTES} bytes, not {len(sequence)}", "sequence")
        if tokens < 1 or epoch < 0:
            raise InvalidInput("tokens must be positive and epoch must not be negative", "tokens")
        if tokens > self._context:
            raise InvalidInput(f"{tokens} tokens are more than the model's context, {self._context}", "tokens")
        needed = blocks_of(tokens)
        if needed > self._cache.blocks:
            most = self._cache.blocks * BLOCK_TOKENS
            raise InvalidInput(f"{tokens} tokens do not fit the KV cache, which holds {most}", "tokens")
        known = self._leases.get(sequence)
        if known is not None and known.epoch > epoch:
            raise WrongPart("this sequence is open with a later epoch")
        if known is None or known.epoch < epoch:
            self.release([sequence])
            lease = _Lease(epoch, tokens, self._take(needed), [0] * self._layers, self._clock())
            self._leases[sequence] = lease
        else:
            known.heard_s = self._clock()
            known.blocks += self._take(needed - len(known.blocks))
            known.tokens = max(known.tokens, tokens)
        self._tell()

    def release(self, sequences: Sequence[bytes]) -> int:
        """Frees sequences at once; gives how many of them were known."""
        released = [lease for sequence in sequences if (lease := self._leases.pop(sequence, None)) is not None]
        for lease in released:
            self._free.extend(lease.blocks)
        self._tell()
        return len(released)

    def reap(self) -> int:
        """Frees sequences that were silent for too long; gives how many."""
        late_s = self._clock() - self._lease_s
        return self.release([sequence for sequence, lease in self._leases.items() if lease.heard_s < late_s])

    def rows(self, places: Sequence[Place], layer: int | None = None) -> CachedSequences:
        """The layout of rows that are to be computed now; they count as cached from here on.

        Args:
            places: Where they belong.
            layer: In which layer; None for every layer.

        Raises:
            InvalidInput: The places are malformed.
            WrongPart: A sequence is not open, or not with this epoch, or misses tokens before these rows.
        """
        layers = range(self._layers) if layer is None else range(layer, layer + 1)
        spans = [self._span(layers, place) for place in places]
        if len({place.sequence for place in places}) != len(places):
            raise InvalidInput("a sequence occurs twice in one call", "places")
        for place in places:
            lease = self._leases[place.sequence]
            for one in layers:
                lease.layer2cached[one] = max(lease.layer2cached[one], place.position + place.rows)
            lease.heard_s = self._clock()
        return self._layout(spans, tuple((place.sequence, place.position, place.rows) for place in places))

    def _layout(self, spans: list[Span], rows: tuple[tuple[bytes, int, int], ...]) -> CachedSequences:
        key = rows, tuple(tuple(span.blocks) for span in spans)
        layout = self._layouts.pop(key, None)
        if layout is None:
            layout = CachedSequences(spans, self._cache, self._rotary, self._rotary.device)
            if len(self._layouts) == LAYOUTS:
                del self._layouts[next(iter(self._layouts))]
        if sum(span.rows for span in spans) <= LAYOUT_ROWS:
            self._layouts[key] = layout
        return layout

    def _span(self, layers: Sequence[int], place: Place) -> Span:
        lease = self._leases.get(place.sequence)
        if lease is None or lease.epoch != place.epoch:
            raise WrongPart("a sequence is not open here, or with another epoch")
        if place.position < 0 or place.rows < 1 or place.position + place.rows > lease.tokens:
            raise InvalidInput("rows stand outside of what their sequence has reserved", "places")
        if any(place.position > lease.layer2cached[layer] for layer in layers):
            raise WrongPart("tokens before these rows are not cached")
        return Span(lease.blocks, place.position, place.rows)

    def _take(self, needed: int) -> list[int]:
        if needed > len(self._free):
            self.reap()
        if needed > len(self._free):
            raise Overloaded(f"the KV cache has {len(self._free)} free blocks, {needed} are needed", RETRY_AFTER_S)
        blocks = [self._free.pop() for _ in range(needed)]
        self._cache.renew(blocks)
        return blocks

    def _tell(self) -> None:
        metrics.KV_BLOCKS.labels("used").set(self._cache.blocks - len(self._free))
        metrics.KV_SEQUENCES.set(len(self._leases))
