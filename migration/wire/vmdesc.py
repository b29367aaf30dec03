"""The JSON description at the end of a precopy stream: what each FULL section consists of.

    {"configuration": {...}, "page_size": 4096, "devices": [{"name": ..., "instance_id": ..., ...},
    ...]}

``configuration`` is written by QEMU 9.0 and newer. A loader does not need the description (``{}``
will do); it is there for people and tools. See :func:`decode_device` for reading sections with it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .constants import VMDESCRIPTION_BYTES_MAX
from .errors import RemoteStreamError
from .fields import counted_name
from .headers import Configuration
from .io import BytesWriter, Reader, Writer
from .vmstate.decode import LIST_TYPES, decode_device, payload_length
from .vmstate.decoded import DecodedDevice, DecodedField, DecodedStruct, Value
from .vmstate.description import VMStateDescription
from .vmstate.elements import U8, U32, CustomElement
from .vmstate.encode import encode_device
from .vmstate.fields import Array, VArray, VBuffer
from .vmstate.jsontext import JsonText
from .vmstate.redescribe import describe_device

__all__ = [
    "DecodedDevice",
    "DecodedField",
    "DecodedStruct",
    "StreamDescription",
    "Value",
    "decode_device",
    "describe_configuration",
    "describe_device",
    "describe_stream",
    "encode_device",
    "parse_vmdesc",
    "payload_length",
]


def describe_stream(
    devices: Iterable[str], *, page_size: int, configuration: str | None = None
) -> bytes:
    """The whole trailer from the parts written while saving.

    :param devices: one JSON object per FULL section, in stream order.
    :param page_size: target page size in bytes.
    :param configuration: from :func:`describe_configuration`; None leaves it out, as QEMU before
        9.0 does.
    """
    text = JsonText()
    text.start_object()
    if configuration is not None:
        text.raw("configuration", configuration)
    text.integer("page_size", page_size)
    text.start_array("devices")
    for device in devices:
        text.raw(None, device)
    text.end_array()
    text.end_object()
    return text.text().encode("ascii")


@dataclass(frozen=True, slots=True)
class StreamDescription:
    """A parsed trailer.

    :ivar page_size: target page size in bytes; None when not given.
    :ivar devices: one description per FULL section, in stream order.
    :ivar configuration: that of the CONFIGURATION section; None before QEMU 9.0.
    """

    page_size: int | None
    devices: tuple[dict[str, Any], ...]
    configuration: dict[str, Any] | None


def parse_vmdesc(data: bytes, *, offset: int = 0) -> StreamDescription:
    """Parse a trailer.

    QEMU describes the elements of a list or tree by repeating keys inside one object, which is not
    quite JSON. Here they become an array ``elements`` in that object.

    :param offset: stream offset of ``data``, for error texts.
    :raises RemoteStreamError: not JSON, not of this shape, or nested absurdly deep.
    """
    if len(data) > VMDESCRIPTION_BYTES_MAX:
        raise RemoteStreamError("description is too long", offset=offset, section="vmdescription")
    try:
        value = json.loads(data, object_pairs_hook=_keep_repeated)
    except (ValueError, RecursionError) as error:
        at = offset + (error.pos if isinstance(error, json.JSONDecodeError) else 0)
        reason = f"description is not JSON: {error}"
        raise RemoteStreamError(reason, offset=at, section="vmdescription") from None
    page_size = value.get("page_size") if isinstance(value, dict) else 0
    devices = value.get("devices", []) if isinstance(value, dict) else None
    configuration = value.get("configuration") if isinstance(value, dict) else None
    if (
        not isinstance(devices, list)
        or not all(isinstance(device, dict) for device in devices)
        or not isinstance(page_size, int | None)
        or not isinstance(configuration, dict | None)
    ):
        raise RemoteStreamError(
            "description is not an object with page_size and devices",
            offset=offset,
            section="vmdescription",
        )
    return StreamDescription(page_size, tuple(devices), configuration)


def _keep_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if result.get("type") not in (*LIST_TYPES, "gtree"):
        return result
    elements: list[dict[str, Any]] = []
    outer: dict[str, Any] = {}
    for key, value in pairs:
        if key == "vmsd_name":
            elements.append({})
        inside = elements and key in ("vmsd_name", "version", "fields", "subsections")
        (elements[-1] if inside else outer)[key] = value
    return {**outer, "elements": elements}


def describe_configuration(configuration: Configuration) -> str:
    """The ``configuration`` object for a stream that starts with that CONFIGURATION section."""
    text = JsonText()
    text.start_object()
    _CONFIGURATION.save(BytesWriter(), _Subject(configuration), description=text)
    text.end_object()
    return text.text()


class _Subject:
    """The CONFIGURATION section as an object of attributes."""

    def __init__(self, configuration: Configuration) -> None:
        self.name = configuration.machine.encode()
        self.len = len(self.name)
        self.target_page_bits = configuration.target_page_bits
        self.capabilities = configuration.capabilities
        self.caps_count = len(configuration.capabilities or ())
        self.uuid = None if configuration.uuid is None else configuration.uuid.bytes


def _save_capability(writer: Writer, value: str) -> None:
    writer.write(counted_name(value, "capability"))


def _load_capability(reader: Reader, current: object) -> str:
    return reader.read(reader.read(1)[0]).decode()


_CAPABILITY = CustomElement("capability", save=_save_capability, load=_load_capability)

_CONFIGURATION = VMStateDescription(
    name="configuration",
    version_id=1,
    fields=(U32("len"), VBuffer("name", size="len")),
    subsections=(
        VMStateDescription(
            name="configuration/target-page-bits",
            version_id=1,
            needed=lambda subject: subject.target_page_bits is not None,
            fields=(U32("target_page_bits"),),
        ),
        VMStateDescription(
            name="configuration/capabilities",
            version_id=1,
            needed=lambda subject: subject.capabilities is not None,
            fields=(
                U32("caps_count"),
                VArray("capabilities", count="caps_count", element=_CAPABILITY),
            ),
        ),
        VMStateDescription(
            name="configuration/uuid",
            version_id=1,
            needed=lambda subject: subject.uuid is not None,
            fields=(Array("uuid.data", 16, U8, attr="uuid"),),
        ),
    ),
)
"""Only ever used to describe; the section itself is written and read by ``headers``."""
