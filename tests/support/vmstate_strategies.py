"""Random descriptions with random objects that fit them.

A description is drawn as a list of *parts*; a part is one or two fields (a length field comes with
what it measures) and a strategy for the values of the attributes they hold. Names are given out by
a counter, so that no two fields of one object collide, the fields of its subsections included.

Every description has a name of its own that no other begins with, and starts with a field. Without
that the format is ambiguous, QEMU's included: a nested struct takes what looks like a subsection of
its name, be it the first bytes of its neighbour or its parent's own subsection.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st

from migration.wire.io import Reader, Writer
from migration.wire.vmstate import (
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Array,
    Bitmap,
    BitmapOf,
    Bool,
    Buffer,
    BufferOf,
    CpuDouble,
    Custom,
    Element,
    Field,
    GTree,
    PointerArray,
    PointerMarkers,
    QList,
    QTailQ,
    Single,
    String,
    StructOf,
    Timer,
    Unused,
    VArray,
    VBuffer,
    VMStateDescription,
    VStructOf,
)

Object = SimpleNamespace
Values = st.SearchStrategy[Any]

_SCALARS: list[tuple[Element, Values]] = [
    (U8, st.integers(0, (1 << 8) - 1)),
    (U16, st.integers(0, (1 << 16) - 1)),
    (U32, st.integers(0, (1 << 32) - 1)),
    (U64, st.integers(0, (1 << 64) - 1)),
    (I8, st.integers(-(1 << 7), (1 << 7) - 1)),
    (I16, st.integers(-(1 << 15), (1 << 15) - 1)),
    (I32, st.integers(-(1 << 31), (1 << 31) - 1)),
    (I64, st.integers(-(1 << 63), (1 << 63) - 1)),
    (Bool, st.booleans()),
    (Timer, st.none() | st.integers(0, (1 << 64) - 2)),
    (CpuDouble, st.floats(allow_nan=False)),
    (BufferOf(3), st.binary(min_size=3, max_size=3)),
    (BitmapOf(70), st.integers(0, (1 << 70) - 1)),
]


@dataclass
class Part:
    """Fields, and what their attributes may hold."""

    fields: list[Field]
    values: Values
    """Draws a dict of attribute values."""


@dataclass
class Described:
    """A description and the objects it can describe."""

    vmsd: VMStateDescription
    objects: Values


class _Names:
    """Names for the fields of one object, and for descriptions."""

    def __init__(self, types: Iterator[int] | None = None) -> None:
        self._types = count(1) if types is None else types
        self._used = count(1)

    def new(self) -> str:
        """A field name, not used in this object yet."""
        return f"f{next(self._used)}"

    def of_type(self) -> str:
        """A description name that is no prefix of any other."""
        return f"t{next(self._types)}."

    def inside(self) -> _Names:
        """Names for a nested object."""
        return _Names(self._types)


def described_objects(depth: int = 2) -> st.SearchStrategy[tuple[VMStateDescription, Any]]:
    """A description with an object that fits it."""
    return descriptions(depth).flatmap(
        lambda drawn: drawn.objects.map(lambda obj: (drawn.vmsd, obj))
    )


@st.composite
def descriptions(draw: st.DrawFn, depth: int = 2) -> Described:
    """A random description; ``depth`` bounds how deep structs nest."""
    return _description(draw, "dev", _Names(), depth)


def _description(draw: st.DrawFn, name: str, names: _Names, depth: int) -> Described:
    first = names.new()
    parts = [Part([U8(first)], _one(first, st.integers(0, 255)))]
    parts += [_part(draw, names, depth) for _ in range(draw(st.integers(0, 4)))]
    subsections = []
    if depth:
        for number in range(draw(st.integers(0, 2))):
            flag = names.new()
            inner = _description(draw, f"{name}/s{number}", names, depth - 1)
            subsections.append((flag, inner))
    version = draw(st.integers(0, 3))
    vmsd = VMStateDescription(
        name=name,
        version_id=version,
        fields=tuple(entry for part in parts for entry in part.fields),
        subsections=tuple(_with_need(inner.vmsd, flag) for flag, inner in subsections),
        pre_load=_forget([flag for flag, _ in subsections]),
    )
    pieces = [part.values for part in parts]
    pieces += [_optional(flag, inner.objects) for flag, inner in subsections]
    return Described(vmsd, st.tuples(*pieces).map(_merge))


def _with_need(vmsd: VMStateDescription, flag: str) -> VMStateDescription:
    """The same, sent while ``flag`` is set on the object; loading sets it."""

    def arrived(obj: Any, version_id: int) -> None:
        setattr(obj, flag, True)

    return VMStateDescription(
        name=vmsd.name,
        version_id=vmsd.version_id,
        fields=vmsd.fields,
        subsections=vmsd.subsections,
        needed=lambda obj: getattr(obj, flag),
        pre_load=vmsd.pre_load,
        post_load=arrived,
    )


def _forget(flags: list[str]) -> Any:
    def forget(obj: Any) -> None:
        for flag in flags:
            setattr(obj, flag, False)

    return forget


def _optional(flag: str, objects: Values) -> Values:
    present = objects.map(lambda obj: {flag: True, **vars(obj)})
    return st.just({flag: False}) | present


def _merge(pieces: tuple[dict[str, Any], ...]) -> Any:
    merged: dict[str, Any] = {}
    for piece in pieces:
        merged.update(piece)
    return Object(**merged)


def _part(draw: st.DrawFn, names: _Names, depth: int) -> Part:
    kinds = [_single, _array, _counted, _blob, _text, _lists, _pointers, _odd, _conditional]
    return draw(st.sampled_from(kinds))(draw, names, depth)


def _element(draw: st.DrawFn, names: _Names, depth: int) -> tuple[Element, Values]:
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(_SCALARS))
    inner = _description(draw, names.of_type(), names.inside(), depth - 1)
    if draw(st.booleans()):
        return StructOf(inner.vmsd, new=Object), inner.objects
    version = inner.vmsd.version_id
    return VStructOf(inner.vmsd, struct_version_id=version, new=Object), inner.objects


def _one(name: str, values: Values) -> Values:
    return values.map(lambda value: {name: value})


def _single(draw: st.DrawFn, names: _Names, depth: int) -> Part:
    name = names.new()
    element, values = _element(draw, names, depth)
    return Part([Single(name, element)], _one(name, values))


def _array(draw: st.DrawFn, names: _Names, depth: int) -> Part:
    name, size = names.new(), draw(st.integers(0, 4))
    element, values = _element(draw, names, depth)
    many = st.lists(values, min_size=size, max_size=size)
    return Part([Array(name, size, element)], _one(name, many))


def _counted(draw: st.DrawFn, names: _Names, depth: int) -> Part:
    length, name = names.new(), names.new()
    width = draw(st.sampled_from([U8, U16, U32, I32]))
    element, values = _element(draw, names, depth)
    many = st.lists(values, max_size=4).map(lambda items: {length: len(items), name: items})
    return Part([width(length), VArray(name, count=length, element=element, limit=1000)], many)


def _blob(draw: st.DrawFn, names: _Names, depth: int) -> Part:
    size, name = names.new(), names.new()
    if draw(st.booleans()):
        blobs = st.binary(max_size=20).map(lambda data: {size: len(data), name: data})
        return Part([U32(size), VBuffer(name, size=size, limit=1000)], blobs)
    maps = st.integers(0, (1 << 130) - 1).map(lambda bits: {size: bits.bit_length(), name: bits})
    return Part([U16(size), Bitmap(name, nbits=size, limit=1000)], maps)


def _text(draw: st.DrawFn, names: _Names, depth: int) -> Part:
    name = names.new()
    prefix = draw(st.sampled_from([U8, U32]))
    return Part([String(name, prefix=prefix, limit=200)], _one(name, st.text(max_size=10)))


def _lists(draw: st.DrawFn, names: _Names, depth: int) -> Part:
    name = names.new()
    inner = _description(draw, names.of_type(), names.inside(), max(0, depth - 1))
    kind = draw(st.sampled_from(["qtailq", "qlist", "direct", "keyed"]))
    if kind in ("qtailq", "qlist"):
        make = QTailQ if kind == "qtailq" else QList
        values = st.lists(inner.objects, max_size=3)
        return Part([make(name, inner.vmsd, new=Object, limit=1000)], _one(name, values))
    if kind == "direct":
        tree = st.dictionaries(st.integers(0, (1 << 64) - 1), inner.objects, max_size=3)
        return Part([GTree(name, inner.vmsd, new=Object, limit=1000)], _one(name, tree))
    key = VMStateDescription(name=names.of_type(), fields=(U16("k"),))
    keys = st.integers(0, 65535).map(lambda number: Object(k=number))
    pairs = st.lists(st.tuples(keys, inner.objects), max_size=3)
    entry = GTree(name, inner.vmsd, new=Object, key_vmsd=key, key_new=Object, limit=1000)
    return Part([entry], _one(name, pairs))


def _pointers(draw: st.DrawFn, names: _Names, depth: int) -> Part:
    length, name = names.new(), names.new()
    element, values = _element(draw, names, depth)
    if isinstance(element, Element) and values is _SCALARS[9][1]:
        element, values = U8, st.integers(0, 255)  # None is a value of a timer, not a null
    present = draw(st.lists(st.booleans(), max_size=4))
    if draw(st.booleans()):
        each = [values if there else st.none() for there in present]
        fixed = PointerArray(name, count=len(present), element=element, present=lambda obj: present)
        return Part([fixed], _one(name, st.tuples(*each).map(list)))
    some = st.lists(st.none() | values, max_size=4)
    marked = PointerArray(
        name, count=length, element=element, markers=PointerMarkers.ALL, limit=1000
    )
    return Part([U8(length), marked], some.map(lambda items: {length: len(items), name: items}))


def _odd(draw: st.DrawFn, names: _Names, depth: int) -> Part:
    name = names.new()
    return draw(
        st.sampled_from(
            [
                Part([Unused(draw(st.integers(0, 5)))], st.just({})),
                Part([Buffer(name, 4)], _one(name, st.binary(min_size=4, max_size=4))),
                Part([_words(name)], _one(name, st.lists(st.sampled_from("abc"), max_size=5))),
                Part([U32(name, version_id=9)], st.just({})),
            ]
        )
    )


def _conditional(draw: st.DrawFn, names: _Names, depth: int) -> Part:
    flag, name = names.new(), names.new()
    element, values = _element(draw, names, depth)

    def is_there(obj: Any, version_id: int) -> bool:
        return bool(getattr(obj, flag))

    with_it = values.map(lambda value: {flag: True, name: value})
    return Part(
        [Bool(flag), Single(name, element, test=is_there)], st.just({flag: False}) | with_it
    )


def _words(name: str) -> Single:
    return Custom(name, "words", save=_save_words, load=_load_words)


def _save_words(writer: Writer, value: list[str]) -> None:
    writer.write(bytes([len(value)]) + "".join(value).encode("ascii"))


def _load_words(reader: Reader, current: object) -> list[str]:
    letters = reader.read(reader.read(1)[0]).decode("ascii")
    if not set(letters) <= set("abc"):
        raise ValueError(f"{letters!r} has other letters than a, b and c")
    return list(letters)
