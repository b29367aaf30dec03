"""File header, CONFIGURATION, section headers and footers: bytes as QEMU writes them, and
refusals.
"""

from __future__ import annotations

import uuid

import pytest

from migration.wire.constants import VMDESCRIPTION_BYTES_MAX, SectionType
from migration.wire.errors import LocalStreamError, RemoteStreamError, TruncatedStreamError
from migration.wire.headers import (
    Configuration,
    FileHeader,
    SectionHeader,
    check_footer,
    read_configuration,
    read_file_header,
    read_section_header,
    read_section_type,
    read_vmdescription,
    write_configuration,
    write_end_of_stream,
    write_file_header,
    write_footer,
    write_section_header,
    write_vmdescription,
)
from migration.wire.io import BytesReader, BytesWriter

RAM = SectionHeader(SectionType.START, 2, "ram", 0, 4)


def test_file_header_bytes() -> None:
    """Magic and version, as at the start of every recorded stream."""
    writer = BytesWriter()
    write_file_header(writer)
    assert writer.getvalue() == b"QEVM\0\0\0\3"
    assert read_file_header(BytesReader(writer.getvalue())) == FileHeader(3)


@pytest.mark.parametrize(
    ("data", "reason", "offset"),
    [
        (b"LIBV\0\0\0\3", "not a migration stream", 0),
        (b"QEVM\0\0\0\2", "obsolete", 4),
        (b"QEVM\0\0\0\4", "version 4", 4),
    ],
)
def test_wrong_file_headers_are_refused(data: bytes, reason: str, offset: int) -> None:
    """With the offset of the byte that is wrong."""
    with pytest.raises(RemoteStreamError, match=reason) as caught:
        read_file_header(BytesReader(data))
    assert caught.value.offset == offset


@pytest.mark.parametrize(
    ("configuration", "data"),
    [
        (Configuration("none"), "07 00000004 6e6f6e65"),
        (
            Configuration("a", target_page_bits=14),
            "07 00000001 61 05 1e 636f6e66696775726174696f6e2f"
            "7461726765742d706167652d62697473 00000001 0000000e",
        ),
        (
            Configuration("a", capabilities=("mapped-ram",)),
            "07 00000001 61 05 1a 636f6e66696775726174"
            "696f6e2f6361706162696c6974696573 00000001 00000001 0a 6d61707065642d72616d",
        ),
        (
            Configuration("a", uuid=uuid.UUID(int=0x0123456789ABCDEF0011223344556677)),
            "07 00000001 61 05 12 636f6e66696775726174696f6e2f75756964 00000001 "
            "0123456789abcdef0011223344556677",
        ),
    ],
)
def test_configuration_bytes(configuration: Configuration, data: str) -> None:
    """The section and each of its subsections, both ways."""
    writer = BytesWriter()
    write_configuration(writer, configuration)
    assert writer.getvalue() == bytes.fromhex(data)
    reader = BytesReader(writer.getvalue())
    assert read_section_type(reader) is SectionType.CONFIGURATION
    assert read_configuration(reader) == configuration
    assert reader.remaining == 0


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"\0\0\0\0", "machine name of 0 bytes"),
        (b"\0\0\1\0" + b"a" * 256, "machine name of 256 bytes"),
        (b"\0\0\0\1\xff", "not UTF-8"),
        (b"\0\0\0\1a\x05\x11configuration/xyz\0\0\0\1", "unknown subsection 'configuration/xyz'"),
        (b"\0\0\0\1a\x05\x12configuration/uuid\0\0\0\2" + bytes(16), "version 2"),
        (b"\0\0\0\1a" + (b"\x05\x12configuration/uuid\0\0\0\1" + bytes(16)) * 2, "twice"),
        (b"\0\0\0\1a\x05\x1aconfiguration/capabilities\0\0\0\1\xff\xff\xff\xff", "capabilities"),
        (b"\0\0\0\1a\x05\x1aconfiguration/capabilities\0\0\0\1\0\0\0\1\0", "empty capability"),
    ],
)
def test_wrong_configurations_are_refused(data: bytes, reason: str) -> None:
    """QEMU's destination refuses them too."""
    with pytest.raises(RemoteStreamError, match=reason) as caught:
        read_configuration(BytesReader(data, section="configuration"))
    assert caught.value.section == "configuration"


@pytest.mark.parametrize("kind", [SectionType.START, SectionType.FULL])
def test_section_header_bytes(kind: SectionType) -> None:
    """Type, id, name, instance and version."""
    header = SectionHeader(kind, 2, "ram", 1, 4)
    writer = BytesWriter()
    write_section_header(writer, header)
    expected = bytes([kind]) + bytes.fromhex("00000002 03 72616d 00000001 00000004")
    assert writer.getvalue() == expected
    reader = BytesReader(expected)
    assert read_section_header(reader, read_section_type(reader), {}) == header


def test_part_and_end_are_known_by_the_id_of_their_start() -> None:
    """They bring nothing but the id; the rest comes from the START."""
    started: dict[int, SectionHeader] = {}
    writer = BytesWriter()
    write_section_header(writer, RAM)
    write_section_header(writer, SectionHeader(SectionType.PART, 2, "ram", 0, 4))
    write_section_header(writer, SectionHeader(SectionType.END, 2, "ram", 0, 4))
    reader = BytesReader(writer.getvalue())
    headers = []
    while reader.remaining:
        headers.append(read_section_header(reader, read_section_type(reader), started))
    assert [header.type.name for header in headers] == ["START", "PART", "END"]
    assert {(header.idstr, header.version_id) for header in headers} == {("ram", 4)}


def test_ids_that_do_not_fit_are_refused() -> None:
    """PART of what was never started; START of what already was."""
    with pytest.raises(RemoteStreamError, match="PART of unknown section id 7"):
        read_section_header(BytesReader(b"\0\0\0\7"), SectionType.PART, {2: RAM})
    again = b"\0\0\0\2\x03ram\0\0\0\0\0\0\0\4"
    with pytest.raises(RemoteStreamError, match="started twice"):
        read_section_header(BytesReader(again), SectionType.START, {2: RAM})


@pytest.mark.parametrize("value", [0x05, 0x09, 0x7E, 0xFF])
def test_what_cannot_stand_between_sections_is_refused(value: int) -> None:
    """A subsection belongs into a payload, a footer behind one."""
    with pytest.raises(RemoteStreamError, match="after section 'timer'"):
        read_section_type(BytesReader(bytes([value])), after="timer")


def test_footers() -> None:
    """The right one passes; another section's, and anything else, do not."""
    writer = BytesWriter()
    write_footer(writer, 2)
    assert writer.getvalue() == b"\x7e\0\0\0\2"
    check_footer(BytesReader(writer.getvalue()), RAM)
    with pytest.raises(RemoteStreamError, match="footer of section id 3, not 2"):
        check_footer(BytesReader(b"\x7e\0\0\0\3"), RAM)
    with pytest.raises(RemoteStreamError, match="where the section footer should be") as caught:
        check_footer(BytesReader(b"\x04\0\0\0\2", base=100), RAM)
    assert (caught.value.offset, caught.value.section) == (100, "ram")


def test_description_trailer() -> None:
    """EOF, then the JSON with its length; a length past the bound is refused before reading."""
    writer = BytesWriter()
    write_end_of_stream(writer)
    write_vmdescription(writer, b"{}")
    assert writer.getvalue() == bytes.fromhex("00 06 00000002 7b7d")
    reader = BytesReader(writer.getvalue())
    assert read_section_type(reader) is SectionType.EOF
    assert read_section_type(reader) is SectionType.VMDESCRIPTION
    assert read_vmdescription(reader) == b"{}"
    length = (VMDESCRIPTION_BYTES_MAX + 1).to_bytes(4, "big")
    with pytest.raises(RemoteStreamError, match="description of") as caught:
        read_vmdescription(BytesReader(length))
    assert not isinstance(caught.value, TruncatedStreamError)


def test_what_does_not_fit_is_not_written() -> None:
    """Names are 1 to 255 bytes of UTF-8, ids 32 bits."""
    writer = BytesWriter()
    for header in (
        SectionHeader(SectionType.FULL, 1 << 32, "a", 0, 1),
        SectionHeader(SectionType.FULL, 1, "", 0, 1),
        SectionHeader(SectionType.FULL, 1, "ä" * 128, 0, 1),
        SectionHeader(SectionType.EOF, 1, "a", 0, 1),
    ):
        with pytest.raises(LocalStreamError):
            write_section_header(writer, header)
    with pytest.raises(LocalStreamError):
        write_configuration(writer, Configuration(""))
    assert writer.getvalue() == b""
