"""The payload of device sections: field by field where a layout is known, else what can be known.

Layouts come from the description trailer. Inside a postcopy package there is none; then the two
sections every machine has are decoded by their fixed layout, and of the rest the bytes are shown
and the subsections that can be recognised by their names.
"""

from __future__ import annotations

import hashlib
import math
import re
from typing import Any

from migration.wire.constants import SectionType
from migration.wire.vmdesc import DecodedStruct, Value, decode_device

from .description import Described
from .events import SectionEvent

RAW_BYTES_SHOWN_MAX = 65536
_SUBSECTION_VERSION_MAX = 1 << 16

_KNOWN: dict[tuple[str, int], dict[str, Any]] = {
    ("timer", 2): {
        "name": "timer",
        "instance_id": 0,
        "vmsd_name": "timer",
        "version": 2,
        "fields": [
            {"name": "cpu_ticks_offset", "type": "int64", "size": 8},
            {"name": "unused", "type": "unused_buffer", "size": 8},
            {"name": "cpu_clock_offset", "type": "int64", "size": 8},
        ],
    },
    ("globalstate", 1): {
        "name": "globalstate",
        "instance_id": 0,
        "vmsd_name": "globalstate",
        "version": 1,
        "fields": [
            {"name": "size", "type": "uint32", "size": 4},
            {"name": "runstate", "type": "buffer", "size": 100},
        ],
    },
}
_KNOWN_LENGTHS = {("timer", 2): 24, ("globalstate", 1): 104}


def decode_section(event: SectionEvent, described: Described | None) -> None:
    """Fill in ``event.device`` from ``event.payload``, and let go of the payload.

    :param described: the section's entry of the description, if there is one; its length must be
        that of the payload.
    :raises RemoteStreamError: the bytes contradict the description.
    """
    payload, event.payload = event.payload or b"", None
    if described is not None:
        event.device = _decode(described.description, payload, event)
        return
    key = (event.header.idstr, event.header.version_id)
    if key in _KNOWN and len(payload) == _KNOWN_LENGTHS[key]:
        event.device = _decode(_KNOWN[key], payload, event)
        return
    event.device = _raw(event.header.idstr, payload)


def _decode(description: dict[str, Any], payload: bytes, event: SectionEvent) -> dict[str, object]:
    decoded = decode_device(
        description, payload, offset=event.payload_offset, section=event.header.idstr
    )
    return struct_to_json(decoded.state)


def struct_to_json(state: DecodedStruct) -> dict[str, object]:
    """Fields by name, in wire order; subsections come last, under their full names.

    The elements of an array that is described one by one, or in several runs (null pointers between
    others), have one name and become one list: names are unique otherwise.
    """
    result: dict[str, object] = {}
    for field in state.fields:
        value = value_to_json(field.value)
        if field.index is None and field.name not in result:
            result[field.name] = value
            continue
        elements = result.setdefault(field.name, [])
        if not isinstance(elements, list):  # the first element or run came alone
            elements = result[field.name] = [elements]
        if field.array_len is not None and isinstance(value, list):
            elements.extend(value)
        else:
            elements.append(value)
    for subsection in state.subsections:
        result[subsection.vmsd_name] = struct_to_json(subsection)
    return result


def value_to_json(value: Value) -> object:
    """Buffers as hex, tree nodes as objects of key and value, the rest as itself."""
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, DecodedStruct):
        return struct_to_json(value)
    if isinstance(value, list):
        return [value_to_json(each) for each in value]
    if isinstance(value, tuple):
        return {"key": value_to_json(value[0]), "value": value_to_json(value[1])}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no name for it
    return value


def _raw(idstr: str, payload: bytes) -> dict[str, object]:
    device: dict[str, object] = {"raw": payload[:RAW_BYTES_SHOWN_MAX].hex(), "bytes": len(payload)}
    if len(payload) > RAW_BYTES_SHOWN_MAX:
        device["sha256"] = hashlib.sha256(payload).hexdigest()
    if subsections := find_subsections(idstr, payload):
        device["subsections"] = subsections
    return device


def find_subsections(idstr: str, payload: bytes) -> list[dict[str, object]]:
    """Subsections recognised in a payload of unknown layout.

    Their names start with the name of the device's own description, which is the last part of the
    section's name: ``05, length, "PIIX3/rcr", be32 version`` in section ``0000:00:01.0/PIIX3``.
    """
    vmsd_name = idstr.rpartition("/")[2].encode()
    found: list[dict[str, object]] = []
    mark = bytes([SectionType.SUBSECTION])
    pattern = re.compile(mark + b"(.)" + re.escape(vmsd_name + b"/"), re.DOTALL)
    for match in pattern.finditer(payload):
        start = match.start() + 2
        name = payload[start : start + match[1][0]]
        version = int.from_bytes(payload[start + len(name) : start + len(name) + 4], "big")
        is_name = len(name) == match[1][0] and all(0x20 < byte < 0x7F for byte in name)
        if is_name and version < _SUBSECTION_VERSION_MAX:
            found.append({"name": name.decode(), "version": version, "at": match.start()})
    return found
