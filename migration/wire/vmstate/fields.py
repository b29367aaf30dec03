"""Fields: a name, when it is there, and one value or many. Declared once, interpreted for saving
and for loading.

Every field takes ``version_id`` (first section version that has it), ``test(obj, version_id)``
(decides alone when given) and ``attr`` (attribute path, when it differs from the wire name). Values
are read from and assigned to attributes of the object that is saved or loaded.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from .attributes import AttributePath, Number, number_getter
from .context import LoadContext, SaveContext
from .elements import BitmapOf, BufferOf, Element, Integer, Test
from .jsontext import JsonText

ARRAY_MAX = 1 << 20
"""Elements an array whose count comes from the stream may have unless its field says otherwise."""

BUFFER_MAX = 16 << 20
"""Bytes a buffer whose length comes from the stream may have unless its field says otherwise."""


class Field(ABC):
    """One entry of a description."""

    def __init__(
        self, name: str, *, version_id: int = 0, test: Test | None = None, attr: str | None = None
    ) -> None:
        self.name = name
        self.version_id = version_id
        self.test = test
        self.attribute = AttributePath(name if attr is None else attr)

    def exists(self, obj: Any, version_id: int) -> bool:
        """Whether a section of ``version_id`` has this field."""
        if self.test is not None:
            return bool(self.test(obj, version_id))
        return self.version_id <= version_id

    @property
    def compressible(self) -> bool:
        """An array of structs with this field can be described by its first element."""
        return self.test is None and self.fixed_size

    @property
    def fixed_size(self) -> bool:
        """It always takes the same number of bytes."""
        return True

    @property
    def counts_by(self) -> str | None:
        """Name of the field that says how long this one is, if it is one."""
        return None

    @property
    def nested_name(self) -> str | None:
        """Name of the description its bytes end with, if it is made of structs."""
        return None

    @abstractmethod
    def save(self, ctx: SaveContext, obj: Any, label: str) -> None:
        """Write the field. ``label`` is its name in the description, unique within it."""

    @abstractmethod
    def load(self, ctx: LoadContext, obj: Any) -> None:
        """Read the field into ``obj``."""

    def _value(self, ctx: SaveContext, obj: Any) -> Any:
        try:
            return self.attribute.get(obj)
        except (AttributeError, IndexError) as error:
            raise ctx.error(f"{type(obj).__name__} has no such value ({error})") from error


def describe_start(
    json: JsonText, label: str, index: int, array_len: int, what: Element, *, compress: bool
) -> None:
    """Begin the description of one element; its nested descriptions come next."""
    json.start_object()
    json.string("name", label)
    if array_len > 1:
        json.integer("array_len" if compress else "index", array_len if compress else index)
    json.string("type", what.type_name)
    if what.opens_struct:
        json.start_object("struct")


def describe_end(json: JsonText, what: Element, size: int) -> None:
    """End what :func:`describe_start` began; ``size`` is the bytes written for it."""
    if what.opens_struct:
        json.end_object()
    json.integer("size", size)
    json.end_object()


class Single(Field):
    """One value."""

    def __init__(
        self,
        name: str,
        element: Element,
        *,
        version_id: int = 0,
        test: Test | None = None,
        attr: str | None = None,
    ) -> None:
        super().__init__(name, version_id=version_id, test=test, attr=attr)
        self.element = element

    @property
    def compressible(self) -> bool:
        return super().compressible and self.element.compressible

    @property
    def fixed_size(self) -> bool:
        return self.element.fixed_size

    @property
    def nested_name(self) -> str | None:
        return self.element.nested_name

    def save(self, ctx: SaveContext, obj: Any, label: str) -> None:
        save_one(ctx, label, self.element, self._value(ctx, obj))

    def load(self, ctx: LoadContext, obj: Any) -> None:
        current = self.attribute.get_or_none(obj)
        self.attribute.set(obj, self.element.decode(ctx, current))


def save_one(ctx: SaveContext, label: str, element: Element, value: Any) -> None:
    """Write and describe one value that is not part of an array."""
    if ctx.json is None:
        element.encode(ctx, value)
        return
    describe_start(ctx.json, label, 0, 1, element, compress=False)
    start = ctx.position
    element.encode(ctx, value)
    describe_end(ctx.json, element, ctx.position - start)


def save_many(
    ctx: SaveContext, label: str, element: Element, values: Sequence[Any], *, compress: bool
) -> None:
    """Write an array; described by its first element, or one by one when they may differ."""
    json = ctx.json
    if isinstance(element, Integer) and (json is None or compress):
        if json is not None and len(values):
            describe_start(json, label, 0, len(values), element, compress=True)
            describe_end(json, element, element.length)
        element.encode_many(ctx, values)
        return
    for index, value in enumerate(values):
        described = json is not None and (index == 0 or not compress)
        ctx.json = json if described else None
        ctx.push(f"[{index}]")
        if ctx.json is not None:
            describe_start(ctx.json, label, index, len(values), element, compress=compress)
        start = ctx.position
        element.encode(ctx, value)
        if ctx.json is not None:
            describe_end(ctx.json, element, ctx.position - start)
        ctx.pop()
    ctx.json = json


def load_many(ctx: LoadContext, element: Element, count: int, current: Any) -> list[Any]:
    """Read ``count`` elements, into the objects ``current`` has where there are any."""
    if type(element) is Integer:
        return element.decode_many(ctx, count)
    have = len(current) if isinstance(current, Sequence) else 0
    values = []
    for index in range(count):
        ctx.push(f"[{index}]")
        values.append(element.decode(ctx, current[index] if index < have else None))
        ctx.pop()
    return values


class VArray(Field):
    """Elements one after the other; how many is another field's business.

    :param count: name of the field sent before that has the count (any integer width), or a
        function of the object.
    :param element: what is repeated, e.g. ``U16``, ``StructOf(vmsd, new=Descriptor)``, ``Timer``,
        ``BufferOf(6)``.
    :param multiply: constant factor to the count.
    :param limit: most elements accepted from a stream.

    The value is a list of exactly that many values (a ``bytes`` is fine for ``U8``). A list that
    has objects is loaded into those objects; missing ones are made by the element's ``new``.
    """

    def __init__(
        self,
        name: str,
        *,
        count: Number,
        element: Element,
        multiply: int = 1,
        limit: int = ARRAY_MAX,
        version_id: int = 0,
        test: Test | None = None,
        attr: str | None = None,
    ) -> None:
        super().__init__(name, version_id=version_id, test=test, attr=attr)
        self.element = element
        self.multiply = multiply
        self.limit = limit
        self._source = count
        self._count = number_getter(count)

    @property
    def compressible(self) -> bool:
        return super().compressible and self.element.compressible

    @property
    def fixed_size(self) -> bool:
        return isinstance(self._source, int) and self.element.fixed_size

    @property
    def nested_name(self) -> str | None:
        return self.element.nested_name

    @property
    def counts_by(self) -> str | None:
        return self._source if isinstance(self._source, str) else None

    def save(self, ctx: SaveContext, obj: Any, label: str) -> None:
        values = self._value(ctx, obj)
        count = self._count(obj) * self.multiply
        if values is None or len(values) != count:
            have = "None" if values is None else f"{len(values)} elements"
            raise ctx.error(f"{have}, the count says {count}")
        compress = self.test is None and self.element.compressible
        save_many(ctx, label, self.element, values, compress=compress)

    def load(self, ctx: LoadContext, obj: Any) -> None:
        count = self._count(obj) * self.multiply
        ctx.count(count, self.limit)
        current = self.attribute.get_or_none(obj)
        self.attribute.set(obj, load_many(ctx, self.element, count, current))


class Array(VArray):
    """A fixed number of elements. ``Array("regs", 16, U64)``."""

    def __init__(
        self,
        name: str,
        count: int,
        element: Element,
        *,
        version_id: int = 0,
        test: Test | None = None,
        attr: str | None = None,
    ) -> None:
        super().__init__(
            name,
            count=count,
            element=element,
            limit=count,
            version_id=version_id,
            test=test,
            attr=attr,
        )


class VBuffer(Field):
    """Raw bytes whose length is another field's business; it is not repeated in front of them.

    :param size: name of the field sent before that has the length, or a function of the object.
    :param multiply: constant factor to the length.
    :param limit: most bytes accepted from a stream.
    """

    def __init__(
        self,
        name: str,
        *,
        size: Number,
        multiply: int = 1,
        limit: int = BUFFER_MAX,
        version_id: int = 0,
        test: Test | None = None,
        attr: str | None = None,
    ) -> None:
        super().__init__(name, version_id=version_id, test=test, attr=attr)
        self.multiply = multiply
        self.limit = limit
        self._source = size
        self._size = number_getter(size)

    @property
    def fixed_size(self) -> bool:
        return isinstance(self._source, int)

    @property
    def counts_by(self) -> str | None:
        return self._source if isinstance(self._source, str) else None

    def save(self, ctx: SaveContext, obj: Any, label: str) -> None:
        save_one(ctx, label, BufferOf(self._size(obj) * self.multiply), self._value(ctx, obj))

    def load(self, ctx: LoadContext, obj: Any) -> None:
        length = self._size(obj) * self.multiply
        if not 0 <= length <= self.limit:
            raise ctx.error(f"{length} bytes, limit is {self.limit}")
        current = self.attribute.get_or_none(obj)
        self.attribute.set(obj, BufferOf(length).decode(ctx, current))


class Bitmap(Field):
    """A bitmap held as an ``int`` (bit i of the number is bit i of the map).

    :param nbits: number of bits: a constant, the name of a field sent before, or a function of the
        object.
    :param limit: most bits accepted when ``nbits`` comes from the stream.
    """

    def __init__(
        self,
        name: str,
        *,
        nbits: Number,
        limit: int = 8 * BUFFER_MAX,
        version_id: int = 0,
        test: Test | None = None,
        attr: str | None = None,
    ) -> None:
        super().__init__(name, version_id=version_id, test=test, attr=attr)
        self.limit = limit
        self._source = nbits
        self._nbits = number_getter(nbits)

    @property
    def fixed_size(self) -> bool:
        return isinstance(self._source, int)

    @property
    def counts_by(self) -> str | None:
        return self._source if isinstance(self._source, str) else None

    def save(self, ctx: SaveContext, obj: Any, label: str) -> None:
        save_one(ctx, label, BitmapOf(self._nbits(obj)), self._value(ctx, obj))

    def load(self, ctx: LoadContext, obj: Any) -> None:
        nbits = self._nbits(obj)
        if not 0 <= nbits <= self.limit:
            raise ctx.error(f"{nbits} bits, limit is {self.limit}")
        self.attribute.set(obj, BitmapOf(nbits).decode(ctx, None))
