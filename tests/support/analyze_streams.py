"""Streams made for a test, and analyses of bytes in memory."""

from __future__ import annotations

import io
import struct
from typing import BinaryIO, cast

from migration.analyze.events import Event
from migration.analyze.session import Session
from migration.analyze.source import Source
from migration.native import crc32c
from migration.wire.commands import Command, write_command
from migration.wire.constants import RamFlag, SectionType
from migration.wire.headers import (
    Configuration,
    SectionHeader,
    write_configuration,
    write_end_of_stream,
    write_file_header,
    write_footer,
    write_section_header,
    write_vmdescription,
)
from migration.wire.io import BytesWriter
from migration.wire.ram_setup import RamSetup, RamSetupBlock, write_ram_setup

PAGE = 4 << 10


class StreamBuilder:
    """Writes a stream piece by piece; ``data`` is what there is so far."""

    def __init__(self, *, has_header: bool = True, has_footers: bool = True) -> None:
        self._writer = BytesWriter()
        self._has_footers = has_footers
        if has_header:
            write_file_header(self._writer)

    @property
    def data(self) -> bytes:
        """The stream so far."""
        return self._writer.getvalue()

    def configuration(self, configuration: Configuration) -> StreamBuilder:
        """CONFIGURATION section."""
        write_configuration(self._writer, configuration)
        return self

    def command(self, *commands: Command) -> StreamBuilder:
        """COMMAND sections."""
        for command in commands:
            write_command(self._writer, command)
        return self

    def section(
        self,
        kind: SectionType,
        section_id: int,
        idstr: str,
        payload: bytes,
        *,
        instance: int = 0,
        version: int = 1,
    ) -> StreamBuilder:
        """A section with its footer."""
        header = SectionHeader(kind, section_id, idstr, instance, version)
        write_section_header(self._writer, header)
        self._writer.write(payload)
        if self._has_footers:
            write_footer(self._writer, section_id)
        return self

    def full(
        self, section_id: int, idstr: str, payload: bytes, *, version: int = 1
    ) -> StreamBuilder:
        """A FULL section."""
        return self.section(SectionType.FULL, section_id, idstr, payload, version=version)

    def ram_start(self, *blocks: RamSetupBlock, multifd_flush: bool = False) -> StreamBuilder:
        """START of ``ram``, section id 2."""
        setup = BytesWriter()
        write_ram_setup(setup, RamSetup(blocks, multifd_flush=multifd_flush))
        return self.section(SectionType.START, 2, "ram", setup.getvalue(), version=4)

    def ram_part(self, *records: bytes) -> StreamBuilder:
        """PART of ``ram``; the EOS is added."""
        payload = b"".join(records) + eos()
        return self.section(SectionType.PART, 2, "ram", payload)

    def ram_end(self, *records: bytes) -> StreamBuilder:
        """END of ``ram``; the EOS is added."""
        return self.section(SectionType.END, 2, "ram", b"".join(records) + eos())

    def raw(self, data: bytes) -> StreamBuilder:
        """Any bytes."""
        self._writer.write(data)
        return self

    def end(self, description: bytes | None = b"{}") -> StreamBuilder:
        """EOF byte and description."""
        write_end_of_stream(self._writer)
        if description is not None:
            write_vmdescription(self._writer, description)
        return self


def page(offset: int, data: bytes, idstr: str | None = None) -> bytes:
    """A PAGE record."""
    return record(RamFlag.PAGE, offset, data, idstr)


def zero(offset: int, idstr: str | None = None) -> bytes:
    """A ZERO record."""
    return record(RamFlag.ZERO, offset, b"\0", idstr)


def record(kind: int, offset: int, data: bytes, idstr: str | None = None) -> bytes:
    """Any record; without a name it continues the last block."""
    if idstr is None:
        return (offset | kind | RamFlag.CONTINUE).to_bytes(8, "big") + data
    name = idstr.encode()
    return (offset | kind).to_bytes(8, "big") + bytes([len(name)]) + name + data


def eos() -> bytes:
    """The record that ends a section's list."""
    return int(RamFlag.EOS).to_bytes(8, "big")


def frames(data: bytes, size: int = 1000) -> bytes:
    """``data`` in checksum frames of ``size`` bytes."""
    out = bytearray()
    for sequence, at in enumerate(range(0, len(data), size)):
        payload = data[at : at + size]
        head = struct.pack(">QI", sequence, len(payload))
        out += struct.pack(">II", len(payload), crc32c(payload, crc32c(head))) + payload
    return bytes(out)


def source_of(data: bytes, name: str = "test") -> Source:
    """A source over bytes in memory."""
    return Source(cast(BinaryIO, io.BytesIO(data)), name)


def analyse(data: bytes, *others: bytes, return_path: bytes | None = None) -> list[Event]:
    """All events of a migration whose channels are these bytes."""
    channels = (data, *others)
    sources = [source_of(each, f"channel {index}") for index, each in enumerate(channels)]
    returns = [] if return_path is None else [source_of(return_path, "return path")]
    return list(Session(sources, returns).events())
