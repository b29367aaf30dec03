"""Saving and loading in one line, for tests about bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from migration.wire.io import BytesReader, BytesWriter
from migration.wire.vmdesc import parse_vmdesc
from migration.wire.vmstate import JsonText, VMStateDescription
from migration.wire.vmstate.fields import Field

Object = SimpleNamespace


def device(*fields: Field, **more: Any) -> VMStateDescription:
    """A description called ``dev`` of version 1."""
    return VMStateDescription(**{"name": "dev", "version_id": 1, "fields": fields, **more})


def save(vmsd: VMStateDescription, obj: object) -> bytes:
    """The payload."""
    writer = BytesWriter()
    vmsd.save(writer, obj)
    return writer.getvalue()


def load(vmsd: VMStateDescription, obj: Any, payload: bytes, version_id: int = 1) -> Any:
    """Load, insist that every byte was taken, and return the object."""
    reader = BytesReader(payload)
    vmsd.load(reader, obj, version_id)
    assert reader.remaining == 0, f"{reader.remaining} bytes left"
    return obj


def describe(vmsd: VMStateDescription, obj: object) -> tuple[bytes, str]:
    """The payload and the description as text."""
    writer, text = BytesWriter(), JsonText()
    text.start_object()
    text.string("name", vmsd.name)
    text.integer("instance_id", 0)
    vmsd.save(writer, obj, description=text)
    text.end_object()
    return writer.getvalue(), text.text()


def described_fields(vmsd: VMStateDescription, obj: object) -> list[dict[str, Any]]:
    """The ``fields`` of the description, as plain JSON reads them."""
    fields: list[dict[str, Any]] = json.loads(describe(vmsd, obj)[1])["fields"]
    return fields


def parsed_description(text: str) -> dict[str, Any]:
    """One device's description as the trailer's parser returns it."""
    return parse_vmdesc(b'{"devices": [' + text.encode() + b"]}").devices[0]


def hexes(parts: Sequence[str]) -> bytes:
    """Bytes from readable pieces of hex."""
    return bytes.fromhex("".join(parts))
