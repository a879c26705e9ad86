from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from expertmesh.errors import InvalidInput, MeshError, Overloaded, WrongPart
from expertmesh.model.cache import BLOCK_TOKENS, KeyValueCache, blocks_of
from expertmesh.serving.leases import ID_BYTES, Leases, Place
from tests.decoders import CPU, PLAIN, full_model

BLOCKS, LAYERS, LEASE_S = 6, PLAIN.layers, 30.0


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def make(clock: Callable[[], float] | None = None, context: int = 5 * BLOCK_TOKENS) -> Leases:
    cache = KeyValueCache(PLAIN, BLOCKS, CPU)
    return Leases(cache, full_model("grouped").rotary, LAYERS, LEASE_S, clock or Clock(), context)


def name(number: int) -> bytes:
    return number.to_bytes(ID_BYTES, "big")


def test_a_sequence_holds_what_it_has_reserved_until_it_is_released() -> None:
    leases = make()
    leases.open(name(1), 0, BLOCK_TOKENS + 1)
    assert leases.free_blocks == BLOCKS - 2
    assert leases.release([name(1), name(2)]) == 1
    assert leases.free_blocks == BLOCKS
    assert leases.release([name(1)]) == 0


def test_layers_of_a_step_share_a_layout_and_other_steps_and_other_blocks_do_not() -> None:
    leases = make()
    leases.open(name(1), 0, 20)
    first, second = [Place(name(1), 0, 0, 4)], [Place(name(1), 0, 4, 1)]
    layout = leases.rows(first, 0)
    assert leases.rows(second, 0) is not layout
    assert leases.rows(first, 1) is layout
    leases.open(name(1), 1, 20 + BLOCK_TOKENS)
    assert leases.rows([Place(name(1), 1, 0, 4)], 0) is not layout


def test_layouts_of_many_rows_are_not_kept() -> None:
    leases = make()
    leases.open(name(1), 0, 65)
    many = [Place(name(1), 0, 0, 65)]
    assert leases.rows(many, 0) is not leases.rows(many, 0)


def test_what_does_not_fit_is_told_when_to_come_again_and_changes_nothing() -> None:
    leases = make()
    leases.open(name(1), 0, 4 * BLOCK_TOKENS)
    with pytest.raises(Overloaded, match="2 free blocks, 3 are needed") as caught:
        leases.open(name(2), 0, 3 * BLOCK_TOKENS)
    assert 0 < caught.value.retry_after_s < 1
    assert leases.free_blocks == 2
    leases.rows([Place(name(1), 0, 0, 1)])


@pytest.mark.parametrize(
    ("sequence", "epoch", "tokens", "what"),
    [
        (b"", 0, 1, "16 bytes, not 0"),
        (bytes(15), 0, 1, "16 bytes, not 15"),
        (bytes(17), 0, 1, "16 bytes, not 17"),
        (bytes(16), -1, 1, "epoch"),
        (bytes(16), 0, 0, "tokens"),
        (bytes(16), 0, -5, "tokens"),
        (bytes(16), 0, 5 * BLOCK_TOKENS + 1, "context"),
        (bytes(16), 0, 2**31 - 1, "context"),
    ],
)
def test_what_can_never_be_opened_is_refused(sequence: bytes, epoch: int, tokens: int, what: str) -> None:
    with pytest.raises(InvalidInput, match=what):
        make().open(sequence, epoch, tokens)


def test_what_can_never_fit_the_cache_is_refused() -> None:
    with pytest.raises(InvalidInput, match="do not fit"):
        make(context=10**6).open(name(1), 0, BLOCKS * BLOCK_TOKENS + 1)


def test_an_opening_may_be_repeated() -> None:
    leases = make()
    leases.open(name(1), 3, 100)
    leases.rows([Place(name(1), 3, 0, 60)])
    leases.open(name(1), 3, 100)
    leases.rows([Place(name(1), 3, 60, 40)])
    assert leases.free_blocks == BLOCKS - 1


def test_a_sequence_that_asks_for_more_keeps_what_is_cached() -> None:
    leases = make()
    leases.open(name(1), 0, 100)
    leases.rows([Place(name(1), 0, 0, 100)])
    for tokens in (120, 300):
        leases.open(name(1), 0, tokens)
        leases.rows([Place(name(1), 0, 100, tokens - 100)])
    assert leases.free_blocks == BLOCKS - 3
    leases.open(name(1), 0, 20)  # less is no reason to take anything away
    leases.rows([Place(name(1), 0, 299, 1)])
    leases.open(name(2), 0, 3 * BLOCK_TOKENS)
    with pytest.raises(Overloaded):
        leases.open(name(1), 0, 400)
    leases.rows([Place(name(1), 0, 299, 1)])


def test_a_later_epoch_starts_anew_and_an_older_one_is_refused() -> None:
    leases = make()
    leases.open(name(1), 0, 100)
    leases.rows([Place(name(1), 0, 0, 50)])
    leases.open(name(1), 1, 100)
    assert leases.free_blocks == BLOCKS - 1
    with pytest.raises(WrongPart, match="another epoch"):
        leases.rows([Place(name(1), 0, 50, 1)])
    with pytest.raises(WrongPart, match="not cached"):
        leases.rows([Place(name(1), 1, 50, 1)])
    with pytest.raises(WrongPart, match="later epoch"):
        leases.open(name(1), 0, 100)
    leases.rows([Place(name(1), 1, 0, 100)])


@pytest.mark.parametrize(
    ("place", "error"),
    [
        (Place(name(9), 0, 0, 1), WrongPart),
        (Place(b"short", 0, 0, 1), WrongPart),
        (Place(name(1), 1, 10, 1), WrongPart),
        (Place(name(1), 0, 11, 1), WrongPart),
        (Place(name(1), 0, 10, 91), InvalidInput),
        (Place(name(1), 0, 100, 1), InvalidInput),
        (Place(name(1), 0, -1, 1), InvalidInput),
        (Place(name(1), 0, 0, 0), InvalidInput),
        (Place(name(1), 0, 2**31, 2**31), InvalidInput),
    ],
)
def test_rows_out_of_place_are_refused_and_change_nothing(place: Place, error: type[MeshError]) -> None:
    leases = make()
    leases.open(name(1), 0, 100)
    leases.open(name(2), 0, 100)
    leases.rows([Place(name(1), 0, 0, 10)])
    with pytest.raises(error):
        leases.rows([Place(name(2), 0, 0, 5), place])
    with pytest.raises(WrongPart, match="not cached"):
        leases.rows([Place(name(2), 0, 5, 1)])  # what stood beside it was not taken down
    leases.rows([Place(name(1), 0, 10, 1)])


def test_a_sequence_may_occur_once_in_a_call() -> None:
    leases = make()
    leases.open(name(1), 0, 100)
    with pytest.raises(InvalidInput, match="twice"):
        leases.rows([Place(name(1), 0, 0, 1), Place(name(1), 0, 0, 2)])


def test_every_layer_has_its_own_rows() -> None:
    leases = make()
    leases.open(name(1), 0, 100)
    leases.rows([Place(name(1), 0, 0, 10)], layer=0)
    leases.rows([Place(name(1), 0, 10, 10)], layer=0)
    with pytest.raises(WrongPart, match="not cached"):
        leases.rows([Place(name(1), 0, 10, 10)], layer=1)
    leases.rows([Place(name(1), 0, 0, 20)], layer=1)


def test_the_silent_are_forgotten_and_those_that_are_heard_of_are_not() -> None:
    clock = Clock()
    leases = make(clock)
    for number in range(3):
        leases.open(name(number), 0, 100)
    clock.now_s += LEASE_S - 1
    leases.open(name(1), 0, 100)
    leases.rows([Place(name(2), 0, 0, 1)])
    clock.now_s += 2
    assert leases.reap() == 1
    assert leases.free_blocks == BLOCKS - 2
    with pytest.raises(WrongPart, match="not open"):
        leases.rows([Place(name(0), 0, 0, 1)])
    clock.now_s += LEASE_S + 1
    assert leases.reap() == 2
    assert leases.free_blocks == BLOCKS


def test_the_silent_make_room_before_anybody_is_refused() -> None:
    clock = Clock()
    leases = make(clock)
    leases.open(name(1), 0, 5 * BLOCK_TOKENS)
    clock.now_s += LEASE_S + 1
    leases.open(name(2), 0, 5 * BLOCK_TOKENS)
    assert leases.free_blocks == BLOCKS - 5


class AnyUse(RuleBasedStateMachine):
    """Whatever is asked in whatever order, every block is free or held by one sequence, and told by the model below."""

    NUMBERS = st.integers(0, 4)
    TOKENS = st.integers(1, 5 * BLOCK_TOKENS)

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.leases = make(self.clock)
        self.held: dict[int, dict[str, Any]] = {}

    @rule(number=NUMBERS, epoch=st.integers(0, 2), tokens=TOKENS)
    def open(self, number: int, epoch: int, tokens: int) -> None:
        known = self.held.get(number)
        if known and known["epoch"] > epoch:
            with pytest.raises(WrongPart):
                self.leases.open(name(number), epoch, tokens)
            return
        if known and known["epoch"] < epoch:
            self.held.pop(number)
            known = None
        if known:
            known["heard"] = self.clock.now_s
        more = blocks_of(tokens) - (known["blocks"] if known else 0)
        if more > self.free:
            self.forget()
        if more > self.free:
            with pytest.raises(Overloaded):
                self.leases.open(name(number), epoch, tokens)
            return
        self.leases.open(name(number), epoch, tokens)
        if not known:
            known = self.held[number] = {"epoch": epoch, "tokens": 0, "blocks": 0, "cached": 0}
        known["heard"] = self.clock.now_s
        known["tokens"] = max(known["tokens"], tokens)
        known["blocks"] = max(known["blocks"], blocks_of(tokens))

    @precondition(lambda self: self.held)
    @rule(data=st.data(), share=st.floats(0, 1), rows=st.integers(1, 200))
    def compute(self, data: st.DataObject, share: float, rows: int) -> None:
        number = data.draw(st.sampled_from(sorted(self.held)))
        known = self.held[number]
        position = int(share * (known["cached"] + 1.3))
        place = Place(name(number), known["epoch"], position, rows)
        if position + rows > known["tokens"]:
            with pytest.raises(InvalidInput):
                self.leases.rows([place])
        elif position > known["cached"]:
            with pytest.raises(WrongPart):
                self.leases.rows([place])
        else:
            self.leases.rows([place])
            known["cached"] = max(known["cached"], position + rows)
            known["heard"] = self.clock.now_s

    @rule(numbers=st.lists(NUMBERS))
    def release(self, numbers: list[int]) -> None:
        known = {number for number in numbers if self.held.pop(number, None)}
        assert self.leases.release([name(number) for number in numbers]) == len(known)

    @rule(seconds=st.floats(0, 20))
    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds

    @rule()
    def reap(self) -> None:
        assert self.leases.reap() == self.forget()

    @property
    def free(self) -> int:
        return BLOCKS - sum(known["blocks"] for known in self.held.values())

    def forget(self) -> int:
        late = [number for number, known in self.held.items() if known["heard"] < self.clock.now_s - LEASE_S]
        for number in late:
            del self.held[number]
        return len(late)

    @invariant()
    def every_block_is_in_one_place(self) -> None:
        assert self.leases.free_blocks == self.free
        held = [block for lease in self.leases._leases.values() for block in lease.blocks]
        assert sorted(held + self.leases._free) == list(range(BLOCKS))


TestAnyUse = AnyUse.TestCase
TestAnyUse.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
