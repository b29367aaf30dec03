"""The bytes of a decoded device again: from its values, not from the bytes kept beside them."""

from __future__ import annotations

import struct

from ..constants import SectionType
from ..errors import LocalStreamError
from .decode import FLOAT_TYPES, LIST_TYPES, SIGNED_TYPES, UNSIGNED_TYPES
from .decoded import DecodedDevice, DecodedField, DecodedStruct, Value
from .elements import TIMER_OFF
from .pointers import NULL_MARKER, VALID_MARKER


def encode_device(device: DecodedDevice) -> bytes:
    """The payload of ``device``'s section; identical to the one decoded unless a value was changed.

    :raises LocalStreamError: a value does not fit its type; device and field are named.
    """
    out = bytearray()
    try:
        _struct(out, device.state, "")
    except LocalStreamError as error:
        raise LocalStreamError(f"section {device.name!r}: {error}") from error
    return bytes(out)


def encode_value(entry: DecodedField, value: Value) -> bytes:
    """One value of ``entry``'s type, or one element of its array.

    :raises LocalStreamError: it does not fit; the field is named.
    """
    out = bytearray()
    _element(out, entry, value, entry.name)
    return bytes(out)


def _struct(out: bytearray, state: DecodedStruct, path: str) -> None:
    for entry in state.fields:
        place = path + entry.name
        if entry.array_len is None:
            _element(out, entry, entry.value, place)
            continue
        if not isinstance(entry.value, list) or len(entry.value) != entry.array_len:
            raise LocalStreamError(f"field {place}: not a list of {entry.array_len} elements")
        for index, value in enumerate(entry.value):
            _element(out, entry, value, f"{place}[{index}]")
    for sub in state.subsections:
        name = sub.vmsd_name.encode()
        if not (1 <= len(name) <= 255 and 0 <= sub.version < 1 << 32):
            raise LocalStreamError(f"subsection {sub.vmsd_name!r} version {sub.version}")
        out += bytes([SectionType.SUBSECTION, len(name)]) + name + sub.version.to_bytes(4, "big")
        _struct(out, sub, f"{path}{sub.vmsd_name}.")


def _element(out: bytearray, entry: DecodedField, value: Value, place: str) -> None:
    if isinstance(value, DecodedStruct):
        _struct(out, value, place + ".")
    elif entry.type in LIST_TYPES and isinstance(value, list):
        _nodes(out, value, place)
    elif entry.type == "gtree" and isinstance(value, list):
        out += len(value).to_bytes(4, "big")
        _nodes(out, value, place)
    else:
        try:
            out += _plain(entry, value)
        except (OverflowError, struct.error, TypeError, ValueError):
            raise LocalStreamError(
                f"field {place}: {value!r} does not fit {entry.type} of {entry.size} bytes"
            ) from None


def _nodes(out: bytearray, nodes: list[Value], place: str) -> None:
    for index, node in enumerate(nodes):
        out += b"\x01"
        parts = node if isinstance(node, tuple) else (node,)
        for part in parts:
            if isinstance(part, DecodedStruct):
                _struct(out, part, f"{place}[{index}].")
            elif isinstance(part, int) and 0 <= part < 1 << 64:
                out += part.to_bytes(8, "big")
            else:
                raise LocalStreamError(f"field {place}[{index}]: {part!r} is not a node")
    out += b"\x00"


def _plain(entry: DecodedField, value: Value) -> bytes:
    """One value without structure; raises one of the errors :func:`_element` turns into ours."""
    kind = entry.type
    if kind == "nullptr" or (kind == "struct" and value is None):
        data = NULL_MARKER
    elif kind == "ptr-marker":
        data = VALID_MARKER if value else NULL_MARKER
    elif kind == "timer":
        data = (TIMER_OFF if value is None else _int(value)).to_bytes(8, "big")
    elif kind in FLOAT_TYPES:
        data = struct.pack(">d", value)
    elif kind == "capability":
        if not isinstance(value, str):
            raise TypeError
        name = value.encode("utf-8", "surrogateescape")
        return bytes([len(name)]) + name
    elif kind == "bool":
        data = _int(value).to_bytes(1, "big")
    elif kind == "bitmap":
        little = _int(value).to_bytes(entry.size, "little")
        words = struct.unpack(f"<{entry.size // 8}Q", little)
        data = struct.pack(f">{entry.size // 8}Q", *words)
    elif kind in SIGNED_TYPES or kind in UNSIGNED_TYPES:
        data = _int(value).to_bytes(entry.size, "big", signed=kind in SIGNED_TYPES)
    elif isinstance(value, bytes | bytearray | memoryview):
        data = bytes(value)
    else:
        raise TypeError
    if len(data) != entry.size:
        raise ValueError
    return data


def _int(value: Value) -> int:
    if not isinstance(value, int):
        raise TypeError
    return value
