"""Bitmaps of target pages: a typed door to ``csrc/bitmap.c``, which the C loops use too.

Every operation checks its range here and does its work in C with the GIL released.
"""

from collections.abc import Iterator

from guestmem._native import ffi, lib

_WORD_BITS = 64


class Bitmap:
    """``nbits`` bits, all clear at first, in an array of 64-bit words that never moves.

    Bit ``i`` is bit ``i % 64`` of word ``i // 64``. The bits past the end stay clear.

    Threads: :meth:`test`, :meth:`test_and_set`, :meth:`set_atomic`, :meth:`take` and everything
    that only reads may run on one map at once, native threads using ``address`` included. The
    plain writers (:meth:`set`, :meth:`clear`, the whole-map ones) need the map to themselves.
    """

    __slots__ = ("_words", "address", "nbits")

    def __init__(self, nbits: int) -> None:
        if nbits < 0:
            raise ValueError(f"a bitmap cannot have {nbits} bits")
        self.nbits = nbits
        self._words = ffi.new("uint64_t[]", max(1, self.word_count))
        #: Address of the first word, for native code; good as long as this object lives.
        self.address = int(ffi.cast("uintptr_t", self._words))

    @property
    def word_count(self) -> int:
        """64-bit words at ``address``."""
        return (self.nbits + _WORD_BITS - 1) // _WORD_BITS

    def __len__(self) -> int:
        return self.nbits

    def __repr__(self) -> str:
        return f"<Bitmap {self.count()} of {self.nbits} set>"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bitmap):
            return NotImplemented
        return self.nbits == other.nbits and self.to_bytes() == other.to_bytes()

    __hash__ = None  # type: ignore[assignment]  # mutable

    def _check(self, start: int, count: int) -> None:
        if start < 0 or count < 0 or start + count > self.nbits:
            raise ValueError(f"bits [{start}, {start + count}) of a bitmap of {self.nbits}")

    def _check_same_size(self, other: "Bitmap") -> None:
        if self.nbits != other.nbits:
            raise ValueError(f"bitmaps of {self.nbits} and {other.nbits} bits")

    def set(self, start: int, count: int = 1) -> None:
        """Set bits ``[start, start + count)``. Not atomic."""
        self._check(start, count)
        lib.bitmap_set(self._words, start, count)

    def set_atomic(self, start: int, count: int = 1) -> int:
        """Set the bits, atomically word by word, release order; how many were clear before."""
        self._check(start, count)
        return lib.bitmap_set_count(self._words, start, count)

    def clear(self, start: int, count: int = 1) -> None:
        """Clear bits ``[start, start + count)``. Not atomic."""
        self._check(start, count)
        lib.bitmap_clear(self._words, start, count)

    def test(self, bit: int) -> bool:
        """The bit's value now (atomic, orders nothing)."""
        self._check(bit, 1)
        return bool(lib.bitmap_test(self._words, bit))

    def test_and_set(self, bit: int) -> bool:
        """Set one bit atomically; its value before."""
        self._check(bit, 1)
        return bool(lib.bitmap_test_and_set(self._words, bit))

    def test_and_clear(self, bit: int) -> bool:
        """Clear one bit atomically; its value before."""
        self._check(bit, 1)
        return bool(lib.bitmap_test_and_clear(self._words, bit))

    def next_set(self, start: int = 0) -> int:
        """First set bit at or after ``start``; ``nbits`` when there is none."""
        return lib.bitmap_next_set(self._words, self.nbits, max(0, start))

    def next_clear(self, start: int = 0) -> int:
        """First clear bit at or after ``start``; ``nbits`` when there is none."""
        return lib.bitmap_next_clear(self._words, self.nbits, max(0, start))

    def next_run(self, start: int = 0) -> tuple[int, int] | None:
        """First run of set bits at or after ``start`` as ``(first bit, length)``, or ``None``."""
        first = ffi.new("uint64_t *")
        length = lib.bitmap_next_run(self._words, self.nbits, max(0, start), first)
        return (first[0], length) if length else None

    def runs(self) -> Iterator[tuple[int, int]]:
        """All runs of set bits in order, as ``(first bit, length)``; sees later changes."""
        position = 0
        while (run := self.next_run(position)) is not None:
            yield run
            position = run[0] + run[1]

    def count(self, start: int = 0, count: int | None = None) -> int:
        """How many bits are set, of all or of ``[start, start + count)``."""
        if count is None:
            count = max(0, self.nbits - start)
        self._check(start, count)
        return lib.bitmap_count(self._words, start, count)

    def fill(self) -> None:
        """Set every bit."""
        lib.bitmap_set(self._words, 0, self.nbits)

    def clear_all(self) -> None:
        """Clear every bit."""
        lib.bitmap_clear(self._words, 0, self.nbits)

    def or_with(self, other: "Bitmap") -> int:
        """Set what is set in ``other``; how many bits are new here. Same size, else ValueError."""
        self._check_same_size(other)
        return lib.bitmap_or_count(self._words, other._words, self.nbits)

    def and_not(self, other: "Bitmap") -> None:
        """Clear what is set in ``other``. Same size, else ValueError."""
        self._check_same_size(other)
        lib.bitmap_andnot(self._words, other._words, self.nbits)

    def complement_of(self, other: "Bitmap") -> None:
        """Become the opposite of ``other`` (which may be this one). Same size, else ValueError."""
        self._check_same_size(other)
        lib.bitmap_complement(self._words, other._words, self.nbits)

    def take(self, other: "Bitmap") -> int:
        """Set what is set in ``other`` and clear it there, word by word atomically.

        A bit that another thread sets in ``other`` meanwhile ends in exactly one of the two.
        Returns how many bits are new here. Same size, else ValueError.
        """
        self._check_same_size(other)
        return lib.bitmap_take(self._words, other._words, self.nbits)

    def widen(self, unit: int) -> None:
        """Set every unit (``unit`` bits, a power of two, counted from bit 0) that has a set bit."""
        if unit <= 0 or unit & (unit - 1):
            raise ValueError(f"a unit of {unit} bits is no power of two")
        lib.bitmap_widen(self._words, self.nbits, unit)

    def copy(self) -> "Bitmap":
        """A second bitmap with the same bits."""
        twin = Bitmap(self.nbits)
        lib.bitmap_or(twin._words, self._words, self.nbits)
        return twin

    def to_bytes(self) -> bytes:
        """``ceil(nbits / 8)`` bytes, bit ``i`` in byte ``i // 8``, lowest bit first."""
        return bytes(ffi.buffer(self._words, (self.nbits + 7) // 8))

    @classmethod
    def from_bytes(cls, data: bytes, nbits: int | None = None) -> "Bitmap":
        """The inverse of :meth:`to_bytes`. ``nbits`` is all of ``data`` unless told.

        :raises ValueError: ``data`` has not exactly the bytes that ``nbits`` need, or sets bits
            past the end.
        """
        nbits = len(data) * 8 if nbits is None else nbits
        if len(data) != (nbits + 7) // 8:
            raise ValueError(f"{len(data)} bytes for a bitmap of {nbits} bits")
        if nbits % 8 and data[-1] >> nbits % 8:
            raise ValueError(f"bits set past the end of a bitmap of {nbits}")
        bitmap = cls(nbits)
        ffi.memmove(bitmap._words, data, len(data))
        return bitmap
