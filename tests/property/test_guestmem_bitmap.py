"""The C bitmap behaves like a set of numbers."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from guestmem import Bitmap
from guestmem._native import ffi, lib

sizes = st.one_of(st.integers(1, 300), st.sampled_from([63, 64, 65, 128, 511, 512, 513, 2048]))


@st.composite
def bitmaps(draw: st.DrawFn, nbits: int | None = None) -> tuple[Bitmap, set[int]]:
    """A bitmap and the set of its bits."""
    nbits = draw(sizes) if nbits is None else nbits
    members = draw(st.sets(st.integers(0, nbits - 1)))
    bitmap = Bitmap(nbits)
    for bit in members:
        bitmap.set(bit)
    return bitmap, members


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Bitmap, set[int], Bitmap, set[int]]:
    """Two bitmaps of one size."""
    nbits = draw(sizes)
    return *draw(bitmaps(nbits)), *draw(bitmaps(nbits))


def members_of(bitmap: Bitmap) -> set[int]:
    return {bit for bit in range(bitmap.nbits) if bitmap.test(bit)}


class BitmapAgainstSet(RuleBasedStateMachine):
    """Any sequence of range operations leaves the bitmap and the set alike."""

    @initialize(nbits=sizes)
    def make(self, nbits: int) -> None:
        self.bitmap = Bitmap(nbits)
        self.model: set[int] = set()

    def _range(self, data: st.DataObject) -> tuple[int, int]:
        start = data.draw(st.integers(0, self.bitmap.nbits))
        return start, data.draw(st.integers(0, self.bitmap.nbits - start))

    @rule(data=st.data())
    def set_range(self, data: st.DataObject) -> None:
        start, count = self._range(data)
        self.bitmap.set(start, count)
        self.model |= set(range(start, start + count))

    @rule(data=st.data())
    def set_range_atomically(self, data: st.DataObject) -> None:
        start, count = self._range(data)
        added = set(range(start, start + count))
        assert self.bitmap.set_atomic(start, count) == len(added - self.model)
        self.model |= added

    @rule(data=st.data())
    def clear_range(self, data: st.DataObject) -> None:
        start, count = self._range(data)
        self.bitmap.clear(start, count)
        self.model -= set(range(start, start + count))

    @rule(data=st.data())
    def test_and_change(self, data: st.DataObject) -> None:
        bit = data.draw(st.integers(0, self.bitmap.nbits - 1))
        if data.draw(st.booleans()):
            assert self.bitmap.test_and_set(bit) == (bit in self.model)
            self.model.add(bit)
        else:
            assert self.bitmap.test_and_clear(bit) == (bit in self.model)
            self.model.discard(bit)

    @rule(shift=st.integers(0, 10))
    def widen(self, shift: int) -> None:
        unit = 1 << shift
        self.bitmap.widen(unit)
        units = {bit // unit for bit in self.model}
        self.model = {bit for bit in range(self.bitmap.nbits) if bit // unit in units}

    @invariant()
    def alike(self) -> None:
        if not hasattr(self, "bitmap"):
            return
        assert members_of(self.bitmap) == self.model
        assert self.bitmap.count() == len(self.model)


TestBitmapAgainstSet = BitmapAgainstSet.TestCase


@given(bitmaps(), st.data())
def test_searching(pair: tuple[Bitmap, set[int]], data: st.DataObject) -> None:
    bitmap, members = pair
    start = data.draw(st.integers(0, bitmap.nbits + 5))
    nbits = bitmap.nbits
    assert bitmap.next_set(start) == min((b for b in members if b >= start), default=nbits)
    clear = set(range(nbits)) - members
    assert bitmap.next_clear(start) == min((b for b in clear if b >= start), default=nbits)


@given(bitmaps())
def test_runs_cover_the_members_once_and_do_not_touch(pair: tuple[Bitmap, set[int]]) -> None:
    bitmap, members = pair
    runs = list(bitmap.runs())
    covered = [bit for start, length in runs for bit in range(start, start + length)]
    assert covered == sorted(members)
    assert all(a + length < b for (a, length), (b, _) in itertools.pairwise(runs))


@given(bitmaps(), st.data())
def test_counting_a_range(pair: tuple[Bitmap, set[int]], data: st.DataObject) -> None:
    bitmap, members = pair
    start = data.draw(st.integers(0, bitmap.nbits))
    count = data.draw(st.integers(0, bitmap.nbits - start))
    assert bitmap.count(start, count) == len(members & set(range(start, start + count)))


@given(pairs())
def test_whole_map_operations(maps: tuple[Bitmap, set[int], Bitmap, set[int]]) -> None:
    a, in_a, b, in_b = maps
    joined = a.copy()
    assert joined.or_with(b) == len(in_b - in_a)
    assert members_of(joined) == in_a | in_b
    less = a.copy()
    less.and_not(b)
    assert members_of(less) == in_a - in_b
    opposite = Bitmap(a.nbits)
    opposite.complement_of(a)
    assert members_of(opposite) == set(range(a.nbits)) - in_a
    assert opposite.count() == a.nbits - len(in_a)
    taken, source = a.copy(), b.copy()
    assert taken.take(source) == len(in_b - in_a)
    assert members_of(taken) == in_a | in_b
    assert source.count() == 0


@given(pairs())
def test_a_map_combined_with_itself(maps: tuple[Bitmap, set[int], Bitmap, set[int]]) -> None:
    a, in_a, _, _ = maps
    assert a.or_with(a) == 0
    assert members_of(a) == in_a
    a.complement_of(a)
    assert members_of(a) == set(range(a.nbits)) - in_a


@given(bitmaps(), st.integers(0, 200), st.integers(0, 70))
def test_or_at_an_offset(pair: tuple[Bitmap, set[int]], start: int, tail: int) -> None:
    source, members = pair
    target = Bitmap(start + source.nbits + tail)
    fresh = lib.bitmap_or_at(
        ffi.cast("uint64_t *", target.address),
        start,
        ffi.cast("uint64_t *", source.address),
        source.nbits,
    )
    assert fresh == len(members)
    assert members_of(target) == {start + bit for bit in members}


@given(bitmaps())
def test_bytes_read_back(pair: tuple[Bitmap, set[int]]) -> None:
    bitmap, members = pair
    data = bitmap.to_bytes()
    assert {i for i in range(len(data) * 8) if data[i // 8] >> (i % 8) & 1} == members
    assert Bitmap.from_bytes(data, bitmap.nbits) == bitmap


@given(st.binary(max_size=50), sizes)
def test_wrong_bytes_are_refused(data: bytes, nbits: int) -> None:
    fits = len(data) == (nbits + 7) // 8 and (nbits % 8 == 0 or data[-1] >> nbits % 8 == 0)
    if fits:
        assert Bitmap.from_bytes(data, nbits).to_bytes() == data
    else:
        with pytest.raises(ValueError, match="bitmap"):
            Bitmap.from_bytes(data, nbits)


@given(sizes, st.data())
def test_ranges_outside_are_refused(nbits: int, data: st.DataObject) -> None:
    bitmap = Bitmap(nbits)
    start = data.draw(st.integers(-3, nbits + 3))
    count = data.draw(st.integers(-3, nbits + 3))
    if start < 0 or count < 0 or start + count > nbits:
        for operation in (bitmap.set, bitmap.clear, bitmap.count, bitmap.set_atomic):
            with pytest.raises(ValueError, match="bitmap"):
                operation(start, count)
    assert bitmap.count() == 0


def test_maps_of_other_sizes_do_not_mix() -> None:
    for name in ("or_with", "and_not", "complement_of", "take"):
        with pytest.raises(ValueError, match="bits"):
            getattr(Bitmap(64), name)(Bitmap(65))


def test_an_empty_map() -> None:
    bitmap = Bitmap(0)
    assert (bitmap.count(), bitmap.next_set(), bitmap.next_run()) == (0, 0, None)
    assert bitmap.to_bytes() == b""


@given(st.integers(0, 700), st.integers(0, 9), st.data())
def test_zero_test_sees_any_byte(length: int, skew: int, data: st.DataObject) -> None:
    buffer = bytearray(b"\xff" * skew + bytes(length) + b"\xff" * 9)
    pointer = ffi.from_buffer(buffer) + skew
    assert lib.buffer_is_zero(pointer, length)
    if length:
        buffer[skew + data.draw(st.integers(0, length - 1))] = data.draw(st.integers(1, 255))
        assert not lib.buffer_is_zero(pointer, length)
