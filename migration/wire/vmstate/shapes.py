"""Fields named after what they hold: buffers, structs, pointers, reserved space, strings, lists and
trees.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..io import Reader, Writer
from .attributes import WHOLE, Number, number_getter
from .context import LoadContext, SaveContext
from .elements import U32, BufferOf, CustomElement, Element, Integer, Test, UnusedBytes
from .fields import ARRAY_MAX, Array, Field, Single, VArray, load_many, save_many, save_one
from .nested import LIST_MAX, ListOf, New, StructOf, TmpOf, TreeOf, VStructOf

if TYPE_CHECKING:
    from .description import VMStateDescription

STRING_MAX = 1 << 14
"""Bytes of UTF-8 a string may have unless its field says otherwise."""


class Buffer(Single):
    """``length`` raw bytes. ``Buffer("mac", 6)``."""

    def __init__(
        self,
        name: str,
        length: int,
        *,
        version_id: int = 0,
        test: Test | None = None,
        attr: str | None = None,
    ) -> None:
        super().__init__(name, BufferOf(length), version_id=version_id, test=test, attr=attr)


class SubArray(Array):
    """``count`` elements of a longer list, from index ``start``; the others are not sent and stay
    as they are.
    """

    def __init__(
        self,
        name: str,
        start: int,
        count: int,
        element: Element,
        *,
        version_id: int = 0,
        test: Test | None = None,
        attr: str | None = None,
    ) -> None:
        super().__init__(name, count, element, version_id=version_id, test=test, attr=attr)
        self.window = slice(start, start + count)
        self.elements = count

    def save(self, ctx: SaveContext, obj: Any, label: str) -> None:
        values = self._value(ctx, obj)[self.window]
        if len(values) != self.elements:
            raise ctx.error(f"{len(values)} elements from {self.window.start}, not {self.elements}")
        compress = self.test is None and self.element.compressible
        save_many(ctx, label, self.element, values, compress=compress)

    def load(self, ctx: LoadContext, obj: Any) -> None:
        ctx.count(self.elements, self.limit)
        whole = self.attribute.get(obj)
        values = load_many(ctx, self.element, self.elements, whole[self.window])
        whole[self.window] = values if isinstance(whole, list) else bytes(values)


class Struct(Single):
    """A nested object, loaded in place. ``Struct("kbd", KBD)``; see :class:`StructOf` about
    versions.
    """

    def __init__(
        self,
        name: str,
        vmsd: VMStateDescription,
        *,
        new: New | None = None,
        version_id: int = 0,
        test: Test | None = None,
        attr: str | None = None,
    ) -> None:
        element = StructOf(vmsd, new=new)
        super().__init__(name, element, version_id=version_id, test=test, attr=attr)


class VStruct(Single):
    """A nested object of the version stated here."""

    def __init__(
        self,
        name: str,
        vmsd: VMStateDescription,
        *,
        struct_version_id: int,
        new: New | None = None,
        version_id: int = 0,
        test: Test | None = None,
        attr: str | None = None,
    ) -> None:
        element = VStructOf(vmsd, struct_version_id=struct_version_id, new=new)
        super().__init__(name, element, version_id=version_id, test=test, attr=attr)


class StructArray(VArray):
    """Nested objects one after the other; ``count`` is a constant, or as in :class:`VArray`."""

    def __init__(
        self,
        name: str,
        vmsd: VMStateDescription,
        *,
        count: Number,
        new: New | None = None,
        limit: int = ARRAY_MAX,
        version_id: int = 0,
        test: Test | None = None,
        attr: str | None = None,
    ) -> None:
        super().__init__(
            name,
            count=count,
            element=StructOf(vmsd, new=new),
            limit=limit,
            version_id=version_id,
            test=test,
            attr=attr,
        )


class Pointer(Single):
    """What the attribute points at, as the thing itself; it may not be None on the sending side.

    :param to: an element (``U64``, ``BufferOf(4)``) or a description.
    """

    def __init__(
        self,
        name: str,
        to: Element | VMStateDescription,
        *,
        new: New | None = None,
        version_id: int = 0,
        test: Test | None = None,
        attr: str | None = None,
    ) -> None:
        element = to if isinstance(to, Element) else StructOf(to, new=new)
        super().__init__(name, element, version_id=version_id, test=test, attr=attr)

    def save(self, ctx: SaveContext, obj: Any, label: str) -> None:
        value = self._value(ctx, obj)
        if value is None:
            raise ctx.error("the pointer is None, which has no form on the wire")
        save_one(ctx, label, self.element, value)


class Unused(Field):
    """Reserved or retired space: zeros out, anything in.

    :param count: number of such spaces, for a field that was once an array; see :class:`VArray`.
    """

    def __init__(
        self,
        length: int,
        *,
        count: Number = 1,
        limit: int = ARRAY_MAX,
        version_id: int = 0,
        test: Test | None = None,
        name: str = "unused",
    ) -> None:
        super().__init__(name, version_id=version_id, test=test, attr=WHOLE)
        self.element = UnusedBytes(length)
        self.limit = limit
        self._source = count
        self._count = number_getter(count)

    @property
    def fixed_size(self) -> bool:
        return isinstance(self._source, int)

    @property
    def counts_by(self) -> str | None:
        return self._source if isinstance(self._source, str) else None

    def save(self, ctx: SaveContext, obj: Any, label: str) -> None:
        values = [None] * self._count(obj)
        save_many(ctx, label, self.element, values, compress=self.test is None)

    def load(self, ctx: LoadContext, obj: Any) -> None:
        count = self._count(obj)
        ctx.count(count, self.limit)
        load_many(ctx, self.element, count, None)


class Validate(Field):
    """Nothing on the wire: a condition on what was loaded so far (or is about to be saved) that
    must hold.
    """

    def __init__(self, name: str, condition: Callable[[Any, int], bool]) -> None:
        super().__init__(name, attr=WHOLE)
        self.condition = condition

    @property
    def compressible(self) -> bool:
        return False  # as in QEMU, where it is a field with a test

    def check(self, obj: Any, version_id: int) -> bool:
        """Whether the condition holds."""
        return bool(self.condition(obj, version_id))

    def save(self, ctx: SaveContext, obj: Any, label: str) -> None:
        """Nothing to write."""

    def load(self, ctx: LoadContext, obj: Any) -> None:
        """Nothing to read."""


class String(Field):
    """Text as its length in bytes (``prefix``, U8 or U32) and its UTF-8, no terminator.

    The format has no strings of its own; QEMU's devices declare a length field and a variable
    buffer, and this is described as those two, ``<name>_len`` and ``<name>``.
    """

    def __init__(
        self,
        name: str,
        *,
        prefix: Integer = U32,
        limit: int = STRING_MAX,
        version_id: int = 0,
        test: Test | None = None,
        attr: str | None = None,
    ) -> None:
        super().__init__(name, version_id=version_id, test=test, attr=attr)
        self.prefix = prefix
        self.limit = limit

    @property
    def fixed_size(self) -> bool:
        return False

    def save(self, ctx: SaveContext, obj: Any, label: str) -> None:
        data = self._value(ctx, obj).encode("utf-8")
        if len(data) > self.limit:
            raise ctx.error(f"{len(data)} bytes of text, limit is {self.limit}")
        save_one(ctx, f"{label}_len", self.prefix, len(data))
        save_one(ctx, label, BufferOf(len(data)), data)

    def load(self, ctx: LoadContext, obj: Any) -> None:
        length = self.prefix.decode(ctx, None)
        if not 0 <= length <= self.limit:
            raise ctx.error(f"{length} bytes of text, limit is {self.limit}")
        at = ctx.position
        try:
            self.attribute.set(obj, ctx.read(length).decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ctx.error(f"not UTF-8: {error.reason}", offset=at) from error


def QTailQ(
    name: str,
    vmsd: VMStateDescription,
    *,
    new: New,
    element_version_id: int | None = None,
    limit: int = LIST_MAX,
    version_id: int = 0,
    test: Test | None = None,
    attr: str | None = None,
) -> Single:
    """A tail queue of objects, held as a Python list; see :class:`ListOf`."""
    element = ListOf(vmsd, new=new, element_version_id=element_version_id, limit=limit)
    return Single(name, element, version_id=version_id, test=test, attr=attr)


def QList(
    name: str,
    vmsd: VMStateDescription,
    *,
    new: New,
    element_version_id: int | None = None,
    limit: int = LIST_MAX,
    version_id: int = 0,
    test: Test | None = None,
    attr: str | None = None,
) -> Single:
    """A singly headed list of objects: the same bytes as :func:`QTailQ`."""
    element = ListOf(
        vmsd, new=new, kind="qlist", element_version_id=element_version_id, limit=limit
    )
    return Single(name, element, version_id=version_id, test=test, attr=attr)


def GTree(
    name: str,
    vmsd: VMStateDescription,
    *,
    new: New,
    key_vmsd: VMStateDescription | None = None,
    key_new: New | None = None,
    limit: int = LIST_MAX,
    version_id: int = 0,
    test: Test | None = None,
    attr: str | None = None,
) -> Single:
    """A tree: a dict by integer key, or pairs with struct keys; see :class:`TreeOf`."""
    element = TreeOf(vmsd, new=new, key_vmsd=key_vmsd, key_new=key_new, limit=limit)
    return Single(name, element, version_id=version_id, test=test, attr=attr)


def Tmp(
    vmsd: VMStateDescription,
    *,
    new: Callable[[Any], Any],
    name: str = "tmp",
    version_id: int = 0,
    test: Test | None = None,
) -> Single:
    """Fields of a short-lived helper made by ``new(parent)``; see :class:`TmpOf`."""
    return Single(name, TmpOf(vmsd, new=new), version_id=version_id, test=test, attr=WHOLE)


def Custom(
    name: str,
    type_name: str,
    *,
    save: Callable[[Writer, Any], None],
    load: Callable[[Reader, Any], Any],
    fixed_size: bool = False,
    version_id: int = 0,
    test: Test | None = None,
    attr: str | None = None,
) -> Single:
    """A value in an encoding of the device's own; see :class:`CustomElement`."""
    element = CustomElement(type_name, save=save, load=load, fixed_size=fixed_size)
    return Single(name, element, version_id=version_id, test=test, attr=attr)
