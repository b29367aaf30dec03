"""A device taken apart with the help of its description: plain values with names, types and
offsets.

All offsets are bytes from the start of the section's payload. The classes are mutable on purpose:
change a value, :func:`~migration.wire.vmstate.encode.encode_device` it, and the new bytes are the
device with that value.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Union

Value = Union[
    int, bool, float, bytes, str, None, "DecodedStruct", list["Value"], tuple["Value", "Value"]
]
"""int, bool, float: what they say. bytes: buffers and encodings nobody described. None: a timer
that is not armed, a null pointer. list: an array or list. tuple: key and value of a tree node. str:
a capability's name."""


@dataclass(slots=True)
class DecodedField:
    """One described field, or one described run of array elements.

    :ivar name: as described; made unique as ``name[k]`` where a description uses a name more than
        once.
    :ivar type: as described, e.g. ``uint32``, ``struct``, ``pci config``.
    :ivar offset: first byte.
    :ivar raw: all its bytes.
    :ivar value: interpreted; a list when ``array_len`` is not None.
    :ivar size: bytes of one element, as described.
    :ivar array_len: number of elements described at once.
    :ivar index: position in an array whose elements are described one by one.
    :ivar is_index_implied: the description left the index out; it follows from the one before.
    """

    name: str
    type: str
    offset: int
    raw: bytes
    value: Value
    size: int
    array_len: int | None = None
    index: int | None = None
    is_index_implied: bool = False


@dataclass(slots=True)
class DecodedStruct:
    """The fields of a device, a nested struct, a list element or a subsection.

    :ivar offset: first byte of the fields (of a subsection: behind its header).
    :ivar length: bytes including subsections.
    """

    vmsd_name: str
    version: int
    offset: int
    fields: list[DecodedField] = field(default_factory=list)
    subsections: list[DecodedStruct] = field(default_factory=list)
    length: int = 0

    def __getitem__(self, name: str) -> Value:
        """Value of the field called ``name``; the list of all values when several elements share
        the name.
        """
        found = [entry for entry in self.fields if entry.name == name]
        if not found:
            raise KeyError(name)
        if len(found) == 1 and found[0].index is None:
            return found[0].value
        values: list[Value] = []
        for entry in found:
            values += entry.value if isinstance(entry.value, list) else [entry.value]
        return values

    def __setitem__(self, name: str, value: Value) -> None:
        """Change the value of the one field called ``name``.

        :raises KeyError: there is none, or it is described element by element.
        """
        found = [entry for entry in self.fields if entry.name == name]
        if len(found) != 1 or found[0].index is not None:
            raise KeyError(name)
        found[0].value = value

    def subsection(self, name: str) -> DecodedStruct | None:
        """The subsection called ``name``, if it was sent."""
        return next((sub for sub in self.subsections if sub.vmsd_name == name), None)

    def walk(self, prefix: str = "") -> Iterator[tuple[str, DecodedField]]:
        """Every field with its path, e.g. ``kbd.pckbd/extended_state.obsrc``, structs taken apart,
        in wire order.
        """
        for entry in self.fields:
            path = prefix + entry.name + ("" if entry.index is None else f"[{entry.index}]")
            yield path, entry
            yield from _walk_value(path, entry.value)
        for sub in self.subsections:
            yield from sub.walk(f"{prefix}{sub.vmsd_name}.")


@dataclass(slots=True)
class DecodedDevice:
    """One FULL section.

    :ivar name: section name, e.g. ``0000:00:01.1/ide``.
    :ivar is_old_style: the description says nothing but the length: there is one field ``data``.
    :ivar state: what was in it. An old-style section has an empty ``vmsd_name`` and version 0 here.
    """

    name: str
    instance_id: int
    state: DecodedStruct
    is_old_style: bool = False

    @property
    def fields(self) -> list[DecodedField]:
        """Top-level fields."""
        return self.state.fields

    @property
    def subsections(self) -> list[DecodedStruct]:
        """Top-level subsections."""
        return self.state.subsections

    def walk(self) -> Iterator[tuple[str, DecodedField]]:
        """Every field with its path, in wire order."""
        return self.state.walk()


def _walk_value(path: str, value: Value) -> Iterator[tuple[str, DecodedField]]:
    if isinstance(value, DecodedStruct):
        yield from value.walk(path + ".")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _walk_value(f"{path}[{index}]", item)
    elif isinstance(value, tuple):
        yield from _walk_value(path + ".key", value[0])
        yield from _walk_value(path + ".value", value[1])
