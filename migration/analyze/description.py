"""The description trailer as the analyser uses it: which device sections there are, and how long.

Parsing, lengths and decoding are ``wire.vmdesc``'s. Its JSON is as hostile as the rest of the
stream; whatever is wrong with it ends in a RemoteStreamError of section ``vmdescription``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from migration.wire.errors import RemoteStreamError
from migration.wire.vmdesc import parse_vmdesc, payload_length


@dataclass(slots=True)
class Described:
    """One entry of ``devices``.

    :ivar description: the JSON object, for the field decoder.
    :ivar length: bytes of payload, from the sizes in it.
    """

    name: str
    instance_id: int
    description: dict[str, Any]
    length: int


@dataclass(slots=True)
class Description:
    """The whole trailer. ``page_size`` is the target page size, if it is stated."""

    page_size: int | None
    devices: list[Described]

    def take(self, name: str, instance_id: int) -> Described | None:
        """The next entry of that name and instance, once: sections come in the list's order."""
        for index, device in enumerate(self.devices):
            if device.name == name and device.instance_id == instance_id:
                return self.devices.pop(index)
        return None


def parse_description(text: bytes, offset: int) -> Description:
    """Parse the trailer.

    :param offset: where the text starts in the file.
    :raises RemoteStreamError: not JSON, or not of the shape QEMU writes.
    """
    stream = parse_vmdesc(text, offset=offset)
    try:
        return Description(stream.page_size, [_device(each) for each in stream.devices])
    except ValueError as error:
        raise RemoteStreamError(
            f"description is damaged: {error}", offset=offset, section="vmdescription"
        ) from None


def _device(entry: dict[str, Any]) -> Described:
    name, instance_id = entry.get("name"), entry.get("instance_id", 0)
    if not isinstance(name, str) or not isinstance(instance_id, int):
        raise ValueError(f"a device with name {name!r} and instance {instance_id!r}")
    return Described(name, instance_id, entry, payload_length(entry))
