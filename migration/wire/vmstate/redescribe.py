"""The description of a decoded device again, for a stream whose values were changed.

Says the same as the one it was decoded with; the sizes are those of the values as they are now.
"""

from __future__ import annotations

from .decode import INLINE_TYPES, LIST_TYPES
from .decoded import DecodedDevice, DecodedField, DecodedStruct, Value
from .encode import encode_device, encode_value
from .jsontext import JsonText


def describe_device(device: DecodedDevice) -> str:
    """The device's object for the trailer's ``devices``.

    :raises LocalStreamError: a value does not fit its type; device and field are named.
    """
    text = JsonText()
    text.start_object()
    text.string("name", device.name)
    text.integer("instance_id", device.instance_id)
    if device.is_old_style:
        text.integer("size", len(encode_device(device)))
        text.start_array("fields")
        for entry in device.fields:
            _old_style(text, entry)
        text.end_array()
    else:
        _members(text, device.state)
    text.end_object()
    return text.text()


def _old_style(text: JsonText, entry: DecodedField) -> None:
    text.start_object()
    text.string("name", entry.name)
    text.integer("size", entry.size)
    text.string("type", entry.type)
    text.end_object()


def _members(text: JsonText, state: DecodedStruct) -> None:
    """``vmsd_name``, ``version``, ``fields``, ``subsections`` of the object that is open."""
    text.string("vmsd_name", state.vmsd_name)
    text.integer("version", state.version)
    text.start_array("fields")
    for entry in state.fields:
        _field(text, entry)
    text.end_array()
    if not state.subsections:
        return
    text.start_array("subsections")
    for sub in state.subsections:
        text.start_object()
        _members(text, sub)
        text.end_object()
    text.end_array()


def _field(text: JsonText, entry: DecodedField) -> None:
    text.start_object()
    text.string("name", entry.name)
    value = entry.value
    if entry.array_len is not None:
        text.integer("array_len", entry.array_len)
        value = value[0] if isinstance(value, list) and value else None
    elif entry.index is not None and not entry.is_index_implied:
        text.integer("index", entry.index)
    text.string("type", entry.type)
    _inside(text, entry, value)
    text.integer("size", len(encode_value(entry, value)))
    text.end_object()


def _inside(text: JsonText, entry: DecodedField, value: Value) -> None:
    """What is nested in one element."""
    if entry.type in INLINE_TYPES and isinstance(value, DecodedStruct):
        _members(text, value)
    elif entry.type in LIST_TYPES or entry.type == "gtree":
        for node in value if isinstance(value, list) else ():
            for part in node if isinstance(node, tuple) else (node,):
                if isinstance(part, DecodedStruct):
                    _members(text, part)
    elif entry.type == "struct":
        text.start_object("struct")
        if isinstance(value, DecodedStruct):
            _members(text, value)
        text.end_object()
