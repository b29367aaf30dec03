"""The frame of a stream: file header, CONFIGURATION, section headers and footers, the description
trailer.

Reading is led by the type byte. :func:`read_section_type` consumes it; every ``read_*`` function
here and in ``commands`` starts **after** that byte. Every ``write_*`` function writes the whole
thing **with** its type byte.

    file header | CONFIGURATION | (COMMAND | START | PART | END | FULL)* | EOF | [VMDESCRIPTION]

Section ids mean nothing across machines: START and FULL introduce them together with the name,
PART, END and the footer refer to them. So :func:`read_section_header` takes the mapping of ids seen
so far.

All functions are sans-I/O and keep no state; they may be used from any thread that owns its reader
or writer. Source: QEMU ``docs/devel/migration/main.rst`` ("Stream structure"),
``migration/savevm.c``.
"""

from __future__ import annotations

import uuid
from collections.abc import MutableMapping
from dataclasses import dataclass

from .constants import (
    CAPABILITIES_MAX,
    FILE_MAGIC,
    FILE_VERSION,
    FILE_VERSION_OBSOLETE,
    MACHINE_NAME_BYTES_MAX,
    SECTION_FOOTER,
    VMDESCRIPTION_BYTES_MAX,
    SectionType,
)
from .errors import LocalStreamError, RemoteStreamError
from .fields import counted_name, decode_name, read_be32, read_name, read_u8, unsigned
from .io import Reader, Writer

_INTRODUCING = (SectionType.START, SectionType.FULL)
_CONTINUING = (SectionType.PART, SectionType.END)
_SUBSECTION_VERSION = 1
_PAGE_BITS = "configuration/target-page-bits"
_CAPABILITIES = "configuration/capabilities"
_UUID = "configuration/uuid"


@dataclass(frozen=True, slots=True)
class FileHeader:
    """The first eight bytes of a stream or snapshot: magic ``QEVM`` and the format version."""

    version: int = FILE_VERSION


@dataclass(frozen=True, slots=True)
class Configuration:
    """What the source says about its machine before anything else. ``None`` means: subsection
    absent.

    :ivar machine: machine type with version, e.g. ``pc-q35-7.2`` or ``none``; 1..255 bytes. A
        receiver compares the received text as a prefix of its own (QEMU accepts ``no`` for
        ``none``).
    :ivar target_page_bits: log2 of the target page size, only sent above the CPU's minimum (never
        on x86).
    :ivar capabilities: the "validated" capabilities that are on, e.g. ``("mapped-ram",)``.
    :ivar uuid: the VM's UUID, only with capability ``validate-uuid``.
    """

    machine: str
    target_page_bits: int | None = None
    capabilities: tuple[str, ...] | None = None
    uuid: uuid.UUID | None = None


@dataclass(frozen=True, slots=True)
class SectionHeader:
    """One START, PART, END or FULL section. For PART and END all but the id comes from the
    START."""

    type: SectionType
    section_id: int
    idstr: str
    instance_id: int
    version_id: int


def write_file_header(writer: Writer) -> None:
    """Write magic and version 3."""
    writer.write(FILE_MAGIC.to_bytes(4, "big") + FILE_VERSION.to_bytes(4, "big"))


def read_file_header(reader: Reader) -> FileHeader:
    """Read and check magic and version.

    :raises RemoteStreamError: not a migration stream, or the obsolete version 2, or an unknown
        version.
    """
    at = reader.position
    magic = read_be32(reader)
    if magic != FILE_MAGIC:
        raise RemoteStreamError(
            f"not a migration stream (magic {magic:#010x})", offset=at, section="header"
        )
    version = read_be32(reader)
    if version == FILE_VERSION_OBSOLETE:
        raise RemoteStreamError("obsolete stream version 2", offset=at + 4, section="header")
    if version != FILE_VERSION:
        raise RemoteStreamError(f"stream version {version}", offset=at + 4, section="header")
    return FileHeader(version)


def read_section_type(reader: Reader, *, after: str | None = None) -> SectionType:
    """Consume the type byte in front of the next thing between sections.

    :param after: name of the section just finished, for the error text.
    :raises RemoteStreamError: unknown type, or a SUBSECTION, which cannot stand here.
    """
    at = reader.position
    value = read_u8(reader)
    try:
        kind = SectionType(value)
    except ValueError:
        kind = SectionType.SUBSECTION
    if kind is SectionType.SUBSECTION:
        place = f" after section {after!r}" if after else ""
        raise RemoteStreamError(f"{value:#04x} is not a section type{place}", offset=at)
    return kind


def write_configuration(writer: Writer, configuration: Configuration) -> None:
    """Write the CONFIGURATION section; subsections in QEMU's order.

    :raises LocalStreamError: a name is empty or too long, page bits or the number of capabilities
        out of range.
    """
    machine = configuration.machine.encode("utf-8")
    if not 1 <= len(machine) <= MACHINE_NAME_BYTES_MAX:
        raise LocalStreamError(f"machine name {configuration.machine!r} must have 1 to 255 bytes")
    out = bytearray([SectionType.CONFIGURATION])
    out += len(machine).to_bytes(4, "big") + machine
    if configuration.target_page_bits is not None:
        out += _subsection(_PAGE_BITS)
        out += unsigned(configuration.target_page_bits, 4, "target page bits")
    if configuration.capabilities is not None:
        if len(configuration.capabilities) > CAPABILITIES_MAX:
            raise LocalStreamError(f"more than {CAPABILITIES_MAX} capabilities")
        out += _subsection(_CAPABILITIES)
        out += len(configuration.capabilities).to_bytes(4, "big")
        for name in configuration.capabilities:
            out += counted_name(name, "capability")
    if configuration.uuid is not None:
        out += _subsection(_UUID) + configuration.uuid.bytes
    writer.write(out)


def read_configuration(reader: Reader) -> Configuration:
    """Read a CONFIGURATION section after its type byte.

    :raises RemoteStreamError: a name out of bounds, an unknown or repeated subsection.
    """
    at = reader.position
    length = read_be32(reader)
    if not 1 <= length <= MACHINE_NAME_BYTES_MAX:
        raise RemoteStreamError(
            f"machine name of {length} bytes", offset=at, section="configuration"
        )
    machine = decode_name(
        reader.read(length), "machine name", offset=at + 4, section="configuration"
    )
    page_bits: int | None = None
    capabilities: tuple[str, ...] | None = None
    vm_uuid: uuid.UUID | None = None
    seen: set[str] = set()
    while reader.peek(1) == bytes([SectionType.SUBSECTION]):
        name = _read_subsection(reader, seen)
        if name == _PAGE_BITS:
            page_bits = read_be32(reader)
        elif name == _CAPABILITIES:
            capabilities = _read_capabilities(reader)
        else:
            vm_uuid = uuid.UUID(bytes=reader.read(16))
    return Configuration(machine, page_bits, capabilities, vm_uuid)


def write_section_header(writer: Writer, header: SectionHeader) -> None:
    """Write type and id, and for START and FULL the name, instance and version as well.

    :raises LocalStreamError: a value does not fit, or the type is not one of the four section
        types.
    """
    section_id = unsigned(header.section_id, 4, "section id")
    if header.type in _CONTINUING:
        writer.write(bytes([header.type]) + section_id)
        return
    if header.type not in _INTRODUCING:
        raise LocalStreamError(f"{header.type.name} has no section header")
    writer.write(
        bytes([header.type])
        + section_id
        + counted_name(header.idstr, "section name")
        + unsigned(header.instance_id, 4, "instance id")
        + unsigned(header.version_id, 4, "version id")
    )


def read_section_header(
    reader: Reader, kind: SectionType, started: MutableMapping[int, SectionHeader]
) -> SectionHeader:
    """Read what follows the type byte of a START, PART, END or FULL section.

    :param started: live sections by id. A START is added to it; PART and END are looked up in it.
        Ids of FULL sections are never referred to again and are not kept.
    :raises RemoteStreamError: PART or END of an id that was never started; a second START of an id;
        a bad name.
    """
    at = reader.position
    section_id = read_be32(reader)
    if kind in _CONTINUING:
        start = started.get(section_id)
        if start is None:
            raise RemoteStreamError(f"{kind.name} of unknown section id {section_id}", offset=at)
        return SectionHeader(kind, section_id, start.idstr, start.instance_id, start.version_id)
    if kind not in _INTRODUCING:
        raise LocalStreamError(f"{kind.name} has no section header")
    idstr = read_name(reader, "section name")
    header = SectionHeader(kind, section_id, idstr, read_be32(reader), read_be32(reader))
    if kind is SectionType.START:
        if section_id in started:
            raise RemoteStreamError(
                f"section id {section_id} started twice", offset=at, section=idstr
            )
        started[section_id] = header
    return header


def write_footer(writer: Writer, section_id: int) -> None:
    """Write the five bytes that end a START, PART, END or FULL section."""
    writer.write(bytes([SECTION_FOOTER]) + unsigned(section_id, 4, "section id"))


def check_footer(reader: Reader, header: SectionHeader) -> None:
    """Consume the footer of ``header``'s section.

    :raises RemoteStreamError: no footer here, or that of another section: the payload was read
        wrongly or is damaged.
    """
    at = reader.position
    mark = read_u8(reader)
    if mark != SECTION_FOOTER:
        raise RemoteStreamError(
            f"{mark:#04x} where the section footer should be", offset=at, section=header.idstr
        )
    section_id = read_be32(reader)
    if section_id != header.section_id:
        raise RemoteStreamError(
            f"footer of section id {section_id}, not {header.section_id}",
            offset=at,
            section=header.idstr,
        )


def write_end_of_stream(writer: Writer) -> None:
    """Write the EOF byte. In precopy a VMDESCRIPTION must follow (a QEMU destination reads one more
    byte)."""
    writer.write(bytes([SectionType.EOF]))


def write_vmdescription(writer: Writer, description: bytes) -> None:
    """Write the JSON trailer; ``b"{}"`` is enough for every QEMU.

    :raises LocalStreamError: longer than :data:`~migration.wire.constants.VMDESCRIPTION_BYTES_MAX`.
    """
    if len(description) > VMDESCRIPTION_BYTES_MAX:
        raise LocalStreamError(f"description of {len(description)} bytes")
    writer.write(bytes([SectionType.VMDESCRIPTION]) + len(description).to_bytes(4, "big"))
    writer.write(description)


def read_vmdescription(reader: Reader) -> bytes:
    """Read the JSON trailer after its type byte; the text is not parsed.

    :raises RemoteStreamError: longer than
        :data:`~migration.wire.constants.VMDESCRIPTION_BYTES_MAX`.
    """
    at = reader.position
    length = read_be32(reader)
    if length > VMDESCRIPTION_BYTES_MAX:
        raise RemoteStreamError(
            f"description of {length} bytes", offset=at, section="vmdescription"
        )
    return reader.read(length)


def _subsection(name: str) -> bytes:
    version = _SUBSECTION_VERSION.to_bytes(4, "big")
    return bytes([SectionType.SUBSECTION]) + counted_name(name, "subsection") + version


def _read_subsection(reader: Reader, seen: set[str]) -> str:
    at = reader.position
    reader.read(1)
    name = read_name(reader, "subsection name", section="configuration")
    version = read_be32(reader)
    if name not in (_PAGE_BITS, _CAPABILITIES, _UUID):
        raise RemoteStreamError(f"unknown subsection {name!r}", offset=at, section="configuration")
    if version != _SUBSECTION_VERSION:
        raise RemoteStreamError(
            f"subsection {name!r} of version {version}", offset=at, section="configuration"
        )
    if name in seen:
        raise RemoteStreamError(f"subsection {name!r} twice", offset=at, section="configuration")
    seen.add(name)
    return name


def _read_capabilities(reader: Reader) -> tuple[str, ...]:
    at = reader.position
    count = read_be32(reader)
    if count > CAPABILITIES_MAX:
        raise RemoteStreamError(f"{count} capabilities", offset=at, section="configuration")
    return tuple(read_name(reader, "capability", section="configuration") for _ in range(count))
