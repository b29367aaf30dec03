"""Encodings of one value, without a name: what an element of an array, or a plain field, looks like
as bytes.

An :class:`Element` is what a field or array is made of: ``U32("head")`` is a field of one ``U32``,
``VArray("descs", count="n", element=U32)`` many of them. Elements keep no state and may be shared
by any number of descriptions and threads.

Source: QEMU ``docs/devel/migration/main.rst`` and the ``VMStateInfo`` table in
``migration/vmstate-types.c``.
"""

from __future__ import annotations

import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from ..io import Reader, Writer
from .context import LoadContext, SaveContext

if TYPE_CHECKING:
    from .fields import Single

Test = Callable[[Any, int], bool]
"""``test(obj, version_id)``: is the field there? It alone decides, the field's version is not
looked at.
"""


class Element(ABC):
    """One kind of value on the wire.

    :ivar type_name: what the description trailer calls it.
    :ivar opens_struct: described in a nested ``struct`` object.
    """

    type_name: str
    opens_struct = False

    @property
    def compressible(self) -> bool:
        """All values look alike, so that an array is described by its first element."""
        return True

    @property
    def fixed_size(self) -> bool:
        """Every value takes the same number of bytes."""
        return True

    @property
    def nested_name(self) -> str | None:
        """Name of the description that comes last in it, if it ends with a struct."""
        return None

    @abstractmethod
    def encode(self, ctx: SaveContext, value: Any) -> None:
        """Write ``value``; raises ``ctx.error(...)`` when it does not fit."""

    @abstractmethod
    def decode(self, ctx: LoadContext, current: Any) -> Any:
        """Read one value. ``current`` is the one the object has now (None: none), for things that
        are compared with it or changed in place."""


class Scalar(Element):
    """An element that, called with a name, makes a field of itself: ``U32("head",
    version_id=2)``.
    """

    def __call__(
        self, name: str, *, version_id: int = 0, test: Test | None = None, attr: str | None = None
    ) -> Single:
        """A field holding one value.

        :param name: name in the description trailer, and of the attribute unless ``attr`` says
            otherwise; may be a path such as ``queue.count`` or ``bus[0].status``.
        :param version_id: first section version that has the field.
        :param test: presence test; when given, ``version_id`` is not looked at.
        """
        from .fields import Single

        return Single(name, self, version_id=version_id, test=test, attr=attr)


class Integer(Scalar):
    """A big-endian integer of 1, 2, 4 or 8 bytes, two's complement when signed."""

    def __init__(self, type_name: str, length: int, *, signed: bool) -> None:
        self.type_name = type_name
        self.length = length
        self.signed = signed
        code = {1: "b", 2: "h", 4: "i", 8: "q"}[length]
        self._code = code if signed else code.upper()
        self._one = struct.Struct(">" + self._code)

    def encode(self, ctx: SaveContext, value: Any) -> None:
        try:
            data = self._one.pack(value)
        except (struct.error, TypeError):
            raise ctx.error(f"{value!r} does not fit {self.type_name}") from None
        ctx.write(data)

    def decode(self, ctx: LoadContext, current: Any) -> Any:
        return self._one.unpack(ctx.read(self.length))[0]

    def encode_many(self, ctx: SaveContext, values: Sequence[Any]) -> None:
        """All of ``values`` in one write."""
        try:
            data = struct.pack(f">{len(values)}{self._code}", *values)
        except (struct.error, TypeError):
            for index, value in enumerate(values):
                ctx.push(f"[{index}]")
                self.encode(ctx, value)
                ctx.pop()
            raise
        ctx.write(data)

    def decode_many(self, ctx: LoadContext, count: int) -> list[Any]:
        """``count`` values in one read."""
        return list(struct.unpack(f">{count}{self._code}", ctx.read(count * self.length)))


class EqualInteger(Integer):
    """An integer the receiver must have too; another value fails the load.

    :param hint: appended to the error, e.g. which option must agree on both sides.
    """

    def __init__(self, type_name: str, length: int, *, signed: bool, hint: str = "") -> None:
        super().__init__(type_name, length, signed=signed)
        self.hint = hint

    def with_hint(self, hint: str) -> EqualInteger:
        """The same encoding with a hint for the error text."""
        return EqualInteger(self.type_name, self.length, signed=self.signed, hint=hint)

    def decode(self, ctx: LoadContext, current: Any) -> Any:
        at = ctx.position
        value = super().decode(ctx, current)
        if value != current:
            hint = f" ({self.hint})" if self.hint else ""
            raise ctx.error(f"{value:#x} in the stream, {current!r} here{hint}", offset=at)
        return value


class BoundedInteger(Integer):
    """``int32 le``: accepted when 0 <= value <= the receiver's own value, which the value then
    replaces.
    """

    def decode(self, ctx: LoadContext, current: Any) -> Any:
        at = ctx.position
        value = super().decode(ctx, current)
        if current is None or not 0 <= value <= current:
            raise ctx.error(f"{value} in the stream, must be 0..{current}", offset=at)
        return value


class Boolean(Scalar):
    """One byte, 0 or 1. A receiver takes every other value for true, as QEMU does."""

    type_name = "bool"

    def encode(self, ctx: SaveContext, value: Any) -> None:
        if value not in (0, 1):
            raise ctx.error(f"{value!r} is not a bool")
        ctx.write(b"\x01" if value else b"\x00")

    def decode(self, ctx: LoadContext, current: Any) -> Any:
        return ctx.read(1) != b"\x00"


class Double(Scalar):
    """An IEEE double as its 64 bits, big-endian. A NaN keeps its payload."""

    type_name = "CPU_Double_U"

    def encode(self, ctx: SaveContext, value: Any) -> None:
        try:
            data = struct.pack(">d", value)
        except (struct.error, TypeError):
            raise ctx.error(f"{value!r} is not a float") from None
        ctx.write(data)

    def decode(self, ctx: LoadContext, current: Any) -> Any:
        return struct.unpack(">d", ctx.read(8))[0]


TIMER_OFF = (1 << 64) - 1


class TimerExpiry(Scalar):
    """Absolute expiry of a timer in ns on its clock, be64; None (all ones on the wire) when it is
    not armed.
    """

    type_name = "timer"

    def encode(self, ctx: SaveContext, value: Any) -> None:
        if value is not None and not (isinstance(value, int) and 0 <= value < TIMER_OFF):
            raise ctx.error(f"{value!r} is not an expiry time in ns, nor None")
        ctx.write((TIMER_OFF if value is None else value).to_bytes(8, "big"))

    def decode(self, ctx: LoadContext, current: Any) -> Any:
        value = int.from_bytes(ctx.read(8), "big")
        return None if value == TIMER_OFF else value


class BufferOf(Element):
    """``length`` bytes as they are.

    A ``bytearray`` or writable ``memoryview`` of that length is filled in place, so that others who
    hold it see the new bytes; anything else is replaced by ``bytes``.
    """

    type_name = "buffer"

    def __init__(self, length: int) -> None:
        self.length = length

    def encode(self, ctx: SaveContext, value: Any) -> None:
        try:
            view = memoryview(value).cast("B")
        except TypeError:
            raise ctx.error(f"{type(value).__name__} is not bytes") from None
        if len(view) != self.length:
            raise ctx.error(f"{len(view)} bytes, must be {self.length}")
        ctx.write(view)

    def decode(self, ctx: LoadContext, current: Any) -> Any:
        data = ctx.read(self.length)
        writable = isinstance(current, memoryview) and not current.readonly
        if (writable or isinstance(current, bytearray)) and len(current) == self.length:
            current[:] = data
            return current
        return data


class UnusedBytes(Element):
    """Bytes that once meant something: zeros are sent, anything is skipped."""

    type_name = "unused_buffer"

    def __init__(self, length: int) -> None:
        self.length = length

    def encode(self, ctx: SaveContext, value: Any) -> None:
        ctx.write(bytes(self.length))

    def decode(self, ctx: LoadContext, current: Any) -> Any:
        ctx.read(self.length)
        return None


class BitmapOf(Element):
    """``nbits`` bits, held as an ``int`` whose bit i is bit i of the bitmap.

    On the wire: ceil(nbits / 64) be64 words, lowest word first. Bits of the last word beyond
    ``nbits`` are sent as zero and refused when they come in set (QEMU's own bitmaps never have
    them).
    """

    type_name = "bitmap"

    def __init__(self, nbits: int) -> None:
        self.nbits = nbits
        self.words = -(-nbits // 64)

    def encode(self, ctx: SaveContext, value: Any) -> None:
        if not (isinstance(value, int) and 0 <= value < 1 << self.nbits):
            raise ctx.error(f"{value!r} is not a bitmap of {self.nbits} bits")
        words = [value >> (64 * i) & ((1 << 64) - 1) for i in range(self.words)]
        ctx.write(struct.pack(f">{self.words}Q", *words))

    def decode(self, ctx: LoadContext, current: Any) -> Any:
        at = ctx.position
        words = struct.unpack(f">{self.words}Q", ctx.read(8 * self.words))
        value = int.from_bytes(struct.pack(f"<{self.words}Q", *words), "little")
        if value >> self.nbits:
            raise ctx.error(f"bits beyond the {self.nbits} of this bitmap are set", offset=at)
        return value


class CustomElement(Scalar):
    """An encoding of the device's own that nobody else can look into.

    :param type_name: shown in the description trailer.
    :param save: ``save(writer, value)`` writes the value.
    :param load: ``load(reader, current)`` returns the value read; it may raise ValueError for
        values it refuses, and must check every length it reads. The reader bounds the section as a
        whole.
    :param fixed_size: every value takes the same number of bytes.
    """

    def __init__(
        self,
        type_name: str,
        *,
        save: Callable[[Writer, Any], None],
        load: Callable[[Reader, Any], Any],
        fixed_size: bool = False,
    ) -> None:
        self.type_name = type_name
        self._save = save
        self._load = load
        self._fixed_size = fixed_size

    @property
    def fixed_size(self) -> bool:
        return self._fixed_size

    def encode(self, ctx: SaveContext, value: Any) -> None:
        try:
            self._save(ctx, value)
        except (ValueError, TypeError, OverflowError) as error:
            raise ctx.error(f"{self.type_name}: {error}") from error

    def decode(self, ctx: LoadContext, current: Any) -> Any:
        at = ctx.position
        try:
            return self._load(ctx, current)
        except (ValueError, TypeError, OverflowError) as error:
            raise ctx.error(f"{self.type_name}: {error}", offset=at) from error


U8 = Integer("uint8", 1, signed=False)
U16 = Integer("uint16", 2, signed=False)
U32 = Integer("uint32", 4, signed=False)
U64 = Integer("uint64", 8, signed=False)
I8 = Integer("int8", 1, signed=True)
I16 = Integer("int16", 2, signed=True)
I32 = Integer("int32", 4, signed=True)
I64 = Integer("int64", 8, signed=True)
U8Equal = EqualInteger("uint8 equal", 1, signed=False)
U16Equal = EqualInteger("uint16 equal", 2, signed=False)
U32Equal = EqualInteger("uint32 equal", 4, signed=False)
U64Equal = EqualInteger("int64 equal", 8, signed=False)  # QEMU's own name for the unsigned one
I32Equal = EqualInteger("int32 equal", 4, signed=True)
I32Le = BoundedInteger("int32 le", 4, signed=True)
Bool = Boolean()
CpuDouble = Double()
Timer = TimerExpiry()
