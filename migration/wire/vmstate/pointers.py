"""Arrays of pointers, some of which may be null."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

from .attributes import Number, number_getter
from .context import LoadContext, SaveContext
from .elements import Element, Test
from .fields import ARRAY_MAX, Field, describe_end, describe_start

NULL_MARKER = b"0"
"""One byte 0x30 stands for a null element."""

VALID_MARKER = b"1"
"""One byte 0x31 in front of an element that is there, only with :attr:`PointerMarkers.ALL`."""


class PointerMarkers(Enum):
    """What stands in front of the elements.

    ``NULLS``: nothing in front of an element that is there, a marker in place of one that is not.
    The bytes do not tell the two apart, so the receiver must know which of its own are null (all
    QEMU versions). ``ALL``: a marker in front of every element; the receiver makes and drops
    objects as told (QEMU 11, for fields declared so).
    """

    NULLS = "nulls"
    ALL = "all"


class _NullElement(Element):
    """How a null is described: newer QEMUs give it a type of its own, 7.2 an empty ``struct`` of
    size 1.
    """

    type_name = "nullptr"

    def encode(self, ctx: SaveContext, value: Any) -> None:
        ctx.write(NULL_MARKER)

    def decode(self, ctx: LoadContext, current: Any) -> Any:
        at = ctx.position
        if (mark := ctx.read(1)) != NULL_MARKER:
            raise ctx.error(f"{mark[0]:#04x} where a null pointer (0x30) should be", offset=at)
        return None


class _MarkerElement(Element):
    """A marker on its own."""

    type_name = "ptr-marker"

    def encode(self, ctx: SaveContext, value: Any) -> None:
        ctx.write(NULL_MARKER if value is None else VALID_MARKER)

    def decode(self, ctx: LoadContext, current: Any) -> Any:
        at = ctx.position
        mark = ctx.read(1)
        if mark not in (NULL_MARKER, VALID_MARKER):
            raise ctx.error(f"{mark[0]:#04x} is not a pointer marker (0x30 or 0x31)", offset=at)
        return mark == VALID_MARKER


_NULL = _NullElement()
_MARKER = _MarkerElement()


class PointerArray(Field):
    """Elements that may be None.

    :param count: constant, name of a field sent before, or function of the object.
    :param element: what a non-null pointer points at, e.g. ``StructOf(vmsd, new=Path)``.
    :param markers: see :class:`PointerMarkers`.
    :param present: for ``NULLS``: ``present(obj)`` tells the receiver which elements to expect, one
        bool each. Without it, those that are not None in the receiver's own list.
    :param limit: most elements accepted when ``count`` comes from the stream.
    """

    def __init__(
        self,
        name: str,
        *,
        count: Number,
        element: Element,
        markers: PointerMarkers = PointerMarkers.NULLS,
        present: Callable[[Any], Sequence[bool]] | None = None,
        limit: int = ARRAY_MAX,
        version_id: int = 0,
        test: Test | None = None,
        attr: str | None = None,
    ) -> None:
        super().__init__(name, version_id=version_id, test=test, attr=attr)
        self.element = element
        self.markers = markers
        self.limit = limit
        self._present = present
        self._source = count
        self._count = number_getter(count)

    @property
    def fixed_size(self) -> bool:
        return False

    @property
    def nested_name(self) -> str | None:
        return self.element.nested_name

    @property
    def counts_by(self) -> str | None:
        return self._source if isinstance(self._source, str) else None

    def save(self, ctx: SaveContext, obj: Any, label: str) -> None:
        values = self._value(ctx, obj)
        count = self._count(obj)
        if len(values) != count:
            raise ctx.error(f"{len(values)} elements, the count says {count}")
        if self.markers is PointerMarkers.ALL:
            self._save_marked(ctx, values, label)
        else:
            self._save_nulls(ctx, values, label)

    def _save_marked(self, ctx: SaveContext, values: Sequence[Any], label: str) -> None:
        for index, value in enumerate(values):
            ctx.push(f"[{index}]")
            self._save_one(ctx, label, _MARKER, value, index, len(values), compress=False)
            if value is not None:
                self._save_one(ctx, label, self.element, value, index, len(values), compress=False)
            ctx.pop()

    def _save_nulls(self, ctx: SaveContext, values: Sequence[Any], label: str) -> None:
        """Nulls and non-nulls have different types, so each run of equals is described as an array
        of its own.
        """
        json = ctx.json
        at = 0
        while at < len(values):
            null = values[at] is None
            end = at
            while end < len(values) and (values[end] is None) == null:
                end += 1
            what = _NULL if null else self.element
            compress = null or (self.test is None and self.element.compressible)
            for index in range(at, end):
                ctx.json = json if index == at or not compress else None
                ctx.push(f"[{index}]")
                length = end - at if compress else len(values)
                self._save_one(ctx, label, what, values[index], index, length, compress=compress)
                ctx.pop()
            at = end
        ctx.json = json

    def _save_one(
        self,
        ctx: SaveContext,
        label: str,
        what: Element,
        value: Any,
        index: int,
        length: int,
        *,
        compress: bool,
    ) -> None:
        if ctx.json is not None:
            describe_start(ctx.json, label, index, length, what, compress=compress)
        start = ctx.position
        what.encode(ctx, value)
        if ctx.json is not None:
            describe_end(ctx.json, what, ctx.position - start)

    def load(self, ctx: LoadContext, obj: Any) -> None:
        count = self._count(obj)
        ctx.count(count, self.limit)
        current = self.attribute.get_or_none(obj)
        have = list(current)[:count] if isinstance(current, Sequence) else []
        have += [None] * (count - len(have))
        expected: Sequence[bool] = [item is not None for item in have]
        if self._present is not None:
            expected = self._present(obj)
        values = []
        for index in range(count):
            ctx.push(f"[{index}]")
            if self.markers is PointerMarkers.ALL:
                there = _MARKER.decode(ctx, None)
            else:
                there = expected[index]
                if not there:
                    _NULL.decode(ctx, None)
            values.append(self.element.decode(ctx, have[index]) if there else None)
            ctx.pop()
        self.attribute.set(obj, values)
