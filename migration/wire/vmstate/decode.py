"""Taking a section apart with nothing but its description from the stream's JSON trailer.

Both come from the peer, so neither is trusted: every length is checked against the payload, nesting
and element counts are bounded, and every error names the device, the field and the stream offset.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import Any

from ..constants import SectionType
from ..errors import RemoteStreamError, TruncatedStreamError
from .context import DEPTH_MAX, SECTION_ELEMENTS_MAX
from .decoded import DecodedDevice, DecodedField, DecodedStruct, Value
from .elements import TIMER_OFF
from .pointers import NULL_MARKER, VALID_MARKER

UNSIGNED_TYPES = frozenset(
    {"uint8", "uint16", "uint32", "uint64", "uint8 equal", "uint16 equal", "uint32 equal"}
    | {"int64 equal"}  # QEMU's name for the unsigned one
)
SIGNED_TYPES = frozenset({"int8", "int16", "int32", "int64", "int32 equal", "int32 le"})
FLOAT_TYPES = frozenset({"CPU_Double_U", "float64"})
LIST_TYPES = frozenset({"qtailq", "qlist"})
INLINE_TYPES = frozenset({"tmp", "vstruct"})

Description = Mapping[str, Any]

_EMPTY_ELEMENTS_MAX = 1 << 16


def decode_device(
    description: Description, payload: bytes, *, offset: int = 0, section: str | None = None
) -> DecodedDevice:
    """Decode the payload of a FULL section field by field; every byte must be described.

    :param description: the device's object from the trailer's ``devices`` (or its
        ``configuration``), as :func:`~migration.wire.vmdesc.parse_vmdesc` returns it. One from a
        plain ``json.loads`` also works as long as all elements of a list look alike.
    :param payload: from behind the section header up to the footer.
    :param offset: stream offset of the first payload byte, for error texts.
    :raises TruncatedStreamError: the payload is shorter than described.
    :raises RemoteStreamError: the description is malformed or does not fit the bytes.
    """
    name = description.get("name", description.get("vmsd_name"))
    if not isinstance(name, str):
        raise RemoteStreamError("a description without a name", offset=offset, section=section)
    decoder = _Decoder(payload, offset, section or name)
    instance_id = decoder.integer(description, "instance_id", default=0)
    if "vmsd_name" in description:
        state = decoder.struct(description)
    else:
        state = DecodedStruct("", 0, 0, decoder.fields(description))
        state.length = decoder.at
    if decoder.at != len(payload):
        raise decoder.error(f"{len(payload) - decoder.at} bytes more than described")
    return DecodedDevice(name, instance_id, state, is_old_style="vmsd_name" not in description)


def payload_length(description: Description) -> int:
    """Bytes the description says its payload has, so that sections can be cut apart without
    decoding them.

    :raises ValueError: the description is malformed.
    """
    return _payload_length(description, 0)


def _payload_length(description: Description, depth: int) -> int:
    if depth > DEPTH_MAX:
        raise ValueError("description nested too deep")
    total = 0
    for entry in _objects(description, "fields"):
        size, count = entry.get("size"), entry.get("array_len", 1)
        if not (isinstance(size, int) and isinstance(count, int) and size >= 0 and count >= 0):
            raise ValueError(f"field {entry.get('name')!r} has no size")
        total += size * count
    for sub in _objects(description, "subsections"):
        name = sub.get("vmsd_name")
        if not isinstance(name, str):
            raise ValueError("a subsection without a name")
        total += 1 + 1 + len(name.encode()) + 4 + _payload_length(sub, depth + 1)
    return total


def _objects(description: Description, key: str) -> list[Mapping[str, Any]]:
    entries = description.get(key, [])
    if not isinstance(entries, list) or not all(isinstance(item, dict) for item in entries):
        raise ValueError(f"{key!r} is not an array of objects")
    return entries


class _Decoder:
    """A cursor over one payload."""

    def __init__(self, payload: bytes, base: int, section: str) -> None:
        self.at = 0
        self._payload = payload
        self._base = base
        self._section = section
        self._path: list[str] = []
        self._elements = 0

    def error(self, reason: str) -> RemoteStreamError:
        """The error to raise at the cursor."""
        place = f"field {'.'.join(self._path)}: " if self._path else ""
        return RemoteStreamError(place + reason, offset=self._base + self.at, section=self._section)

    def take(self, length: int) -> bytes:
        """The next ``length`` bytes."""
        end = self.at + length
        if end > len(self._payload):
            place = f"field {'.'.join(self._path)}: " if self._path else ""
            raise TruncatedStreamError(
                f"{place}wanted {length} bytes, {len(self._payload) - self.at} left",
                offset=self._base + self.at,
                section=self._section,
            )
        data = self._payload[self.at : end]
        self.at = end
        return bytes(data)

    def integer(self, description: Description, key: str, *, default: int | None = None) -> int:
        """A non-negative integer member of a description."""
        value = description.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.error(f"description has {key} {value!r}")
        return value

    def text(self, description: Description, key: str) -> str:
        """A string member of a description."""
        value = description.get(key)
        if not isinstance(value, str):
            raise self.error(f"description has {key} {value!r}")
        return value

    def objects(self, description: Description, key: str) -> list[Mapping[str, Any]]:
        """A member that is an array of objects; absent is empty."""
        try:
            return _objects(description, key)
        except ValueError as error:
            raise self.error(f"description: {error}") from None

    def struct(self, description: Description) -> DecodedStruct:
        """Fields, then subsections."""
        if len(self._path) > DEPTH_MAX:
            raise self.error(f"description nested deeper than {DEPTH_MAX}")
        start = self.at
        name = self.text(description, "vmsd_name")
        result = DecodedStruct(name, self.integer(description, "version", default=0), start)
        result.fields = self.fields(description)
        for sub in self.objects(description, "subsections"):
            result.subsections.append(self._subsection(sub))
        result.length = self.at - start
        return result

    def fields(self, description: Description) -> list[DecodedField]:
        """All of ``description``'s fields.

        QEMU 10.0 leaves the ``index`` out of the last element of an array that is described element
        by element; it is the one that follows.
        """
        found: list[DecodedField] = []
        for entry in self.objects(description, "fields"):
            field = self._field(entry)
            before = found[-1] if found else None
            if (
                before is not None
                and before.name == field.name
                and before.index is not None
                and field.index is None
                and field.array_len is None
            ):
                field.index = before.index + (before.array_len or 1)
                field.is_index_implied = True
            found.append(field)
        return found

    def _subsection(self, description: Description) -> DecodedStruct:
        name = self.text(description, "vmsd_name")
        version = self.integer(description, "version")
        raw = name.encode()
        expected = bytes([SectionType.SUBSECTION, len(raw) & 0xFF]) + raw
        expected += (version & 0xFFFF_FFFF).to_bytes(4, "big")
        if self._payload[self.at : self.at + len(expected)] != expected:
            raise self.error(f"subsection {name!r} version {version} is described but not here")
        self.take(len(expected))
        self._path.append(name)
        result = self.struct(description)
        self._path.pop()
        return result

    def _field(self, description: Description) -> DecodedField:
        name = self.text(description, "name")
        self._path.append(name)
        kind = self.text(description, "type")
        size = self.integer(description, "size")
        array_len = description.get("array_len")
        index = self.integer(description, "index") if "index" in description else None
        start = self.at
        value: Value
        if array_len is None:
            value = self._element(description, kind, size)
        else:
            count = self.integer(description, "array_len")
            self._count(count)
            least = count * (1 if kind == "capability" else size)
            if least > len(self._payload) - self.at:
                self.take(least)  # raises, before a list of that length is built
            if size == 0 and count > _EMPTY_ELEMENTS_MAX:
                raise self.error(f"{count} elements of no size")
            value = [self._element(description, kind, size) for _ in range(count)]
        self._path.pop()
        raw = self._payload[start : self.at]
        return DecodedField(name, kind, start, raw, value, size, array_len, index)

    def _element(self, description: Description, kind: str, size: int) -> Value:
        start = self.at
        read = _READERS.get(kind)
        value = self.take(size) if read is None else read(self, description, kind, size)
        # Only the first of several capability names is described, and names differ in length.
        if self.at - start != size and not (kind == "capability" and "array_len" in description):
            raise self.error(f"{self.at - start} bytes, described as {size}")
        return value

    def _count(self, elements: int) -> None:
        self._elements += elements
        if self._elements > SECTION_ELEMENTS_MAX:
            raise self.error(f"more than {SECTION_ELEMENTS_MAX} elements")

    def _unsigned(self, description: Description, kind: str, size: int) -> Value:
        return int.from_bytes(self._number(size), "big")

    def _signed(self, description: Description, kind: str, size: int) -> Value:
        return int.from_bytes(self._number(size), "big", signed=True)

    def _number(self, size: int) -> bytes:
        if size not in (1, 2, 4, 8):
            raise self.error(f"an integer of {size} bytes")
        return self.take(size)

    def _bool(self, description: Description, kind: str, size: int) -> Value:
        value = self.take(1)[0]
        return bool(value) if value in (0, 1) else value

    def _float(self, description: Description, kind: str, size: int) -> Value:
        value: float = struct.unpack(">d", self.take(8))[0]
        return value

    def _timer(self, description: Description, kind: str, size: int) -> Value:
        value = int.from_bytes(self.take(8), "big")
        return None if value == TIMER_OFF else value

    def _bitmap(self, description: Description, kind: str, size: int) -> Value:
        if size % 8:
            raise self.error(f"a bitmap of {size} bytes")
        words = struct.unpack(f">{size // 8}Q", self.take(size))
        return int.from_bytes(struct.pack(f"<{size // 8}Q", *words), "little")

    def _capability(self, description: Description, kind: str, size: int) -> Value:
        return self.take(self.take(1)[0]).decode("utf-8", "surrogateescape")

    def _null(self, description: Description, kind: str, size: int) -> Value:
        if self._payload[self.at : self.at + 1] != NULL_MARKER:
            raise self.error("no null marker (0x30) where a null pointer is described")
        self.take(1)
        return None

    def _marker(self, description: Description, kind: str, size: int) -> Value:
        mark = self._payload[self.at : self.at + 1]
        if mark not in (NULL_MARKER, VALID_MARKER):
            raise self.error("no pointer marker (0x30 or 0x31) where one is described")
        return self.take(1) == VALID_MARKER

    def _nested(self, description: Description, kind: str, size: int) -> Value:
        inner = description if kind in INLINE_TYPES else description.get("struct")
        if not isinstance(inner, Mapping):
            raise self.error("a struct without a description")
        if "fields" in inner:
            return self.struct(inner)
        # QEMU 7.2 describes a null element of a pointer array as an empty struct of size 1.
        if kind == "struct" and size == 1:
            return self._null(description, kind, size)
        return self.take(size)

    def _list(self, description: Description, kind: str, size: int) -> Value:
        elements = self._described_elements(description)
        end = self.at + size
        items: list[Value] = []
        while self._more(end):
            inner = elements[min(len(items), len(elements) - 1)] if elements else None
            if inner is None:
                raise self.error("a list whose elements are not described")
            self._path.append(f"[{len(items)}]")
            items.append(self.struct(inner))
            self._path.pop()
        return items

    def _tree(self, description: Description, kind: str, size: int) -> Value:
        elements = self._described_elements(description)
        end = self.at + size
        count = int.from_bytes(self.take(4), "big")
        has_struct_keys = "elements" in description and len(elements) == 2 * count
        nodes: list[Value] = []
        while self._more(end):
            if not elements or len(nodes) >= count:
                raise self.error(f"more than the {count} nodes described")
            self._path.append(f"[{len(nodes)}]")
            key: Value
            if has_struct_keys:
                key = self.struct(elements[2 * len(nodes)])
                item = self.struct(elements[2 * len(nodes) + 1])
            else:
                key = int.from_bytes(self.take(8), "big")
                item = self.struct(elements[min(len(nodes), len(elements) - 1)])
            nodes.append((key, item))
            self._path.pop()
        if len(nodes) != count:
            raise self.error(f"{len(nodes)} nodes, {count} announced")
        return nodes

    def _described_elements(self, description: Description) -> list[Mapping[str, Any]]:
        """One description per element where the repeated keys were kept, else the one that is left
        of them.
        """
        if "elements" in description:
            return self.objects(description, "elements")
        return [description] if "fields" in description else []

    def _more(self, end: int) -> bool:
        if self.at >= end:
            raise self.error("the list goes on past its described size")
        self._count(1)
        mark = self.take(1)[0]
        if mark > 1:
            raise self.error(f"{mark:#04x} where a list goes on (1) or ends (0)")
        return mark == 1


_Read = Callable[[_Decoder, Description, str, int], Value]
_READERS: dict[str, _Read] = {
    **dict.fromkeys(UNSIGNED_TYPES, _Decoder._unsigned),
    **dict.fromkeys(SIGNED_TYPES, _Decoder._signed),
    **dict.fromkeys(FLOAT_TYPES, _Decoder._float),
    **dict.fromkeys(LIST_TYPES, _Decoder._list),
    **dict.fromkeys(INLINE_TYPES, _Decoder._nested),
    "bool": _Decoder._bool,
    "timer": _Decoder._timer,
    "bitmap": _Decoder._bitmap,
    "capability": _Decoder._capability,
    "nullptr": _Decoder._null,
    "ptr-marker": _Decoder._marker,
    "struct": _Decoder._nested,
    "gtree": _Decoder._tree,
}
