"""Device sections of a machine we do not know: where each ends, and the bytes in it."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

from migration.analyze.cut import cut_by_description, find_description, read_to_footer
from migration.analyze.description import parse_description
from migration.analyze.source import Source
from migration.wire import headers
from migration.wire.commands import Command, Ping, read_command
from migration.wire.constants import SectionType
from migration.wire.errors import RemoteStreamError
from migration.wire.headers import SectionHeader
from migration.wire.io import BytesReader

_PING_BYTES = 9  # type, be16 command, be16 length, be32 value
_FOOTER_BYTES = 5
_DISK_NAMES = (
    "ide",
    "virtio-blk",
    "virtio-scsi",
    "scsi",
    "nvme",
    "fdc",
    "ahci",
    "sd-card",
    "usb-storage",
)


@dataclass(frozen=True, slots=True)
class OpaqueSection:
    """One FULL section, its payload untouched."""

    idstr: str
    instance_id: int
    version_id: int
    payload: bytes


def in_package(package: bytes) -> Iterator[OpaqueSection | Command]:
    """What a postcopy package holds, in order. It has no description: the footers tell.

    :raises RemoteStreamError: a section without its footer, or something that is not for a package;
        offsets count from the start of the package.
    """
    source = Source(io.BytesIO(package), "package")
    with source.package(len(package)):
        while not source.at_end():
            kind = headers.read_section_type(source)
            if kind is SectionType.COMMAND:
                yield read_command(source)
            elif kind is SectionType.FULL:
                header = headers.read_section_header(source, kind, {})
                payload = read_to_footer(source, header, {}, len(package))
                headers.check_footer(source, header)
                yield _section(header, payload)
            else:
                raise RemoteStreamError(
                    f"a {kind.name} section inside the package", offset=source.position - 1
                )


class PrecopyTail:
    """The end of a precopy stream, from its first device section on, as it comes.

    Nothing in front says how long it is, and with a return path the source waits for our answer
    instead of closing. The description at the very end says it all.
    """

    def __init__(self, bytes_max: int, *, has_footers: bool = True) -> None:
        self._data = bytearray()
        self._bytes_max = bytes_max
        self._has_footers = has_footers
        self.description = b""

    def feed(self, data: bytes) -> None:
        """:raises RemoteStreamError: more than the bound without an end."""
        self._data += data
        if len(self._data) > self._bytes_max:
            raise RemoteStreamError(
                f"more than {self._bytes_max} bytes of device state without a description",
                offset=0,
                section="devices",
            )

    def take_ping(self) -> Ping | None:
        """A PING that the source now waits on (one of our own kind does, before the end)."""
        tail = bytes(self._data[-_PING_BYTES - _FOOTER_BYTES :])
        if len(tail) < _PING_BYTES + _FOOTER_BYTES or tail[0] != 0x7E:
            return None
        if tail[_FOOTER_BYTES : _FOOTER_BYTES + 5] != b"\x08\x00\x02\x00\x04":
            return None
        del self._data[-_PING_BYTES:]
        return Ping(int.from_bytes(tail[-4:], "big"))

    def sections(self) -> list[OpaqueSection] | None:
        """All sections once the description is there and fits, else None."""
        if not self._has_footers:
            found = find_description(bytes(self._data), 0)
            return None if found is None else self._cut(found[0], found[1].devices)
        at = self._data.rfind(b"\x00\x06")
        while at > 0:
            length = int.from_bytes(self._data[at + 2 : at + 6], "big")
            if at + 6 + length == len(self._data) and self._data[at - _FOOTER_BYTES] == 0x7E:
                text = self.description = bytes(self._data[at + 6 :])
                return self._cut(at, parse_description(text, at + 6).devices)
            at = self._data.rfind(b"\x00\x06", 0, at + 1)
        return None

    def _cut(self, end: int, devices: list) -> list[OpaqueSection]:  # type: ignore[type-arg]
        data = bytes(self._data[:end])
        cuts = cut_by_description(data, devices, has_footers=self._has_footers)
        return [_section(cut.header, cut.payload) for cut in cuts]


def _section(header: SectionHeader, payload: bytes) -> OpaqueSection:
    return OpaqueSection(header.idstr, header.instance_id, header.version_id, payload)


def run_state_of(sections: list[OpaqueSection]) -> str:
    """What ``globalstate`` says the guest was in; ``running`` without one, as QEMU takes it."""
    for section in sections:
        if section.idstr == "globalstate" and len(section.payload) >= 36:
            reader = BytesReader(section.payload)
            reader.read(4)
            return reader.read(32).split(b"\0", 1)[0].decode("ascii", "replace")
    return "running"


def block_devices_of(sections: list[OpaqueSection]) -> tuple[str, ...]:
    """Sections whose name is that of a disk controller or disk."""
    names = []
    for section in sections:
        last = section.idstr.rsplit("/", 1)[-1].lower()
        if any(last == name or last.startswith(f"{name}-") for name in _DISK_NAMES):
            names.append(section.idstr)
    return tuple(dict.fromkeys(names))
