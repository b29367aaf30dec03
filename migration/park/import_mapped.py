"""``postcopy park FILE``: a snapshot in QEMU's mapped-ram layout becomes a parked VM.

Its pages lie at fixed places, so they are copied from file to file; a hole stays a hole.
"""

from __future__ import annotations

import os
from pathlib import Path

from guestmem.geometry import TARGET_PAGE_BITS, TARGET_PAGE_BYTES
from migration.runtime.file_channel import FileReader
from migration.runtime.snapshots.mapped import (
    CAPABILITY,
    MappedArea,
    file_ops,
    read_end_of_list,
    read_setup,
)
from migration.wire import headers
from migration.wire.constants import RAM_SECTION_IDSTR, SectionType
from migration.wire.errors import RemoteStreamError, TruncatedStreamError
from migration.wire.headers import Configuration, SectionHeader

from .manifest import Manifest
from .sections import OpaqueSection, PrecopyTail
from .sink import DEVICE_BYTES_MAX
from .store import ParkWriter

_READ_BYTES = 256 << 10


def is_mapped(path: Path, offset: int) -> bool:
    """Whether the stream at ``offset`` of this file is in the mapped-ram layout.

    :raises StreamError: no stream starts there. :raises OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        configuration = _read_head(_reader(file.fileno(), path, offset))
    return CAPABILITY in (configuration.capabilities or ())


def _reader(fd: int, path: Path, offset: int) -> FileReader:
    return FileReader(file_ops(fd, name=str(path)), position=offset)


def _read_head(reader: FileReader) -> Configuration:
    at = reader.position
    headers.read_file_header(reader)
    if headers.read_section_type(reader) is not SectionType.CONFIGURATION:
        raise RemoteStreamError("configuration section missing", offset=at + 8)
    return headers.read_configuration(reader)


class MappedImport:
    """One file on its way into a directory. :meth:`run` returns when it is there."""

    def __init__(self, path: Path, offset: int, directory: Path) -> None:
        """:raises ParkError: the directory cannot be made."""
        self._path = path
        self._offset = offset
        self._writer = ParkWriter(directory)
        self._stopped = False
        self._areas: tuple[MappedArea, ...] = ()

    def run(self) -> Manifest:
        """:raises StreamError: bad bytes. :raises OSError: disk. Then nothing is left."""
        try:
            with open(self._path, "rb") as file:
                return self._import(file.fileno())
        except BaseException:
            self._writer.discard()
            raise

    def stop(self) -> None:
        """Any thread: :meth:`run` ends soon, with an error."""
        self._stopped = True

    def _import(self, fd: int) -> Manifest:
        reader = _reader(fd, self._path, self._offset)
        configuration = _read_head(reader)
        tail = self._read_sections(reader)
        sections = self._read_devices(reader, tail)
        for area, block in zip(self._areas, self._writer.blocks, strict=True):
            self._copy(fd, area, block.fd)
        return self._writer.finish(
            machine=configuration.machine,
            uuid=None if configuration.uuid is None else str(configuration.uuid),
            sections=sections,
            origin="file",
            peer=str(self._path),
            description=tail.description,
        )

    def _read_sections(self, reader: FileReader) -> PrecopyTail:
        """RAM's sections, up to the type byte of the first device section."""
        started: dict[int, SectionHeader] = {}
        while (kind := headers.read_section_type(reader)) is not SectionType.FULL:
            header = headers.read_section_header(reader, kind, started)
            if header.idstr != RAM_SECTION_IDSTR:
                raise RemoteStreamError(
                    f"live section {header.idstr!r}: only RAM is taken in",
                    offset=reader.position,
                    section=header.idstr,
                )
            if kind is SectionType.START:
                setup, self._areas = read_setup(reader)
                self._writer.add_blocks(setup)
            else:
                read_end_of_list(reader)
            headers.check_footer(reader, header)
        tail = PrecopyTail(DEVICE_BYTES_MAX)
        tail.feed(bytes([SectionType.FULL]))
        return tail

    def _read_devices(self, reader: FileReader, tail: PrecopyTail) -> list[OpaqueSection]:
        while (sections := tail.sections()) is None:
            data = reader.read_some(_READ_BYTES)
            if not data:
                raise TruncatedStreamError(
                    "the file ends without a description of its devices", offset=reader.position
                )
            tail.feed(data)
        return sections

    def _copy(self, fd: int, area: MappedArea, to_fd: int) -> None:
        """Only what the bitmap names: elsewhere the file may hold what a page was before."""
        for first, count in area.read_bitmap(fd).runs():
            at, left = first << TARGET_PAGE_BITS, count * TARGET_PAGE_BYTES
            left = min(left, area.used_length - at)
            while left:
                if self._stopped:
                    raise InterruptedError("stopped")
                copied = os.copy_file_range(fd, to_fd, min(left, 64 << 20), area.pages_at + at, at)
                if not copied:
                    raise TruncatedStreamError(
                        f"the pages of block {area.idstr!r} are cut short",
                        offset=area.pages_at + at,
                    )
                at, left = at + copied, left - copied
