"""A parked VM as the snapshot file it could be: what the analyser reads, without a copy on disk.

The layout is QEMU's mapped-ram: each block's pages at one place, so nothing has to be looked at
before it is read. Device sections come as they are; the description of their fields only when the
source gave one (a precopy does).
"""

from __future__ import annotations

import contextlib
import io
import os
import uuid
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guestmem import Bitmap
from guestmem.geometry import TARGET_PAGE_BITS, TARGET_PAGE_BYTES, align_up
from migration.runtime.snapshots.mapped import CAPABILITY, bitmap_bytes
from migration.wire import headers
from migration.wire.constants import RAM_SECTION_IDSTR, RAM_SECTION_VERSION, RamFlag, SectionType
from migration.wire.headers import Configuration, SectionHeader
from migration.wire.io import Writer
from migration.wire.ram_setup import RamSetup, RamSetupBlock, plan_mapped_ram, write_ram_setup

from .manifest import DESCRIPTION, DEVICES, MANIFEST, Manifest, ParkedBlock, load
from .store import data_extents

_RAM_ID = 0x10000


def is_parked(path: str) -> bool:
    """Whether there is a parked VM, as opposed to a file."""
    return os.path.isfile(os.path.join(path, MANIFEST))


@dataclass(frozen=True, slots=True)
class _Piece:
    """``length`` bytes from ``start`` on: of memory, of a file, or (neither) zeros."""

    start: int
    length: int
    data: bytes = b""
    fd: int = -1


class _Layout:
    """A :class:`~migration.wire.io.Writer` that notes what would be written where."""

    def __init__(self) -> None:
        self.pieces: list[_Piece] = []
        self.position = 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self._add(_Piece(self.position, len(data), data=bytes(data)))

    def skip_to(self, position: int) -> None:
        """Zeros up to there."""
        self._add(_Piece(self.position, position - self.position))

    def file(self, fd: int, length: int) -> None:
        """The first ``length`` bytes of a file."""
        self._add(_Piece(self.position, length, fd=fd))

    def _add(self, piece: _Piece) -> None:
        if piece.length:
            self.pieces.append(piece)
            self.position += piece.length


class ParkedStream(io.RawIOBase):
    """The bytes, to be read front to back. Closing it closes the RAM files."""

    def __init__(self, directory: Path) -> None:
        """:raises ParkError: no parked VM, or a damaged one. :raises OSError: unreadable."""
        super().__init__()
        manifest = load(directory)
        with ExitStack() as stack:
            self._pieces = _lay_out(directory, manifest, stack)
            self._stack = stack.pop_all()
        self._starts = [piece.start for piece in self._pieces]
        self._at = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """As much as one piece has, zeros included."""
        index = bisect_right(self._starts, self._at) - 1
        piece = self._pieces[index]
        within = self._at - piece.start
        count = min(len(buffer), piece.length - within)
        if count <= 0:
            return 0
        if piece.fd >= 0:
            data = os.pread(piece.fd, count, within).ljust(count, b"\0")
        else:
            data = piece.data[within : within + count] if piece.data else bytes(count)
        buffer[:count] = data
        self._at += count
        return count

    def close(self) -> None:
        if not self.closed:
            self._stack.close()
        super().close()


def _lay_out(directory: Path, manifest: Manifest, stack: ExitStack) -> Sequence[_Piece]:
    out = _Layout()
    headers.write_file_header(out)
    vm_uuid = None if manifest.uuid is None else uuid.UUID(manifest.uuid)
    configuration = Configuration(manifest.machine, uuid=vm_uuid, capabilities=(CAPABILITY,))
    headers.write_configuration(out, configuration)
    _write_ram(out, directory, manifest.blocks, stack)
    payload = (directory / DEVICES).read_bytes()
    for number, device in enumerate(manifest.devices):
        header = SectionHeader(
            SectionType.FULL, number, device.idstr, device.instance_id, device.version_id
        )
        headers.write_section_header(out, header)
        out.write(payload[device.offset : device.offset + device.length])
        headers.write_footer(out, number)
    headers.write_end_of_stream(out)
    with contextlib.suppress(FileNotFoundError):
        headers.write_vmdescription(out, (directory / DESCRIPTION).read_bytes())
    return out.pieces


def _write_ram(
    out: _Layout, directory: Path, blocks: Sequence[ParkedBlock], stack: ExitStack
) -> None:
    """START with everything, and an empty END."""
    files: dict[str, int] = {}
    for block in blocks:
        files[block.idstr] = os.open(directory / block.file, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, files[block.idstr])
    start = SectionHeader(SectionType.START, _RAM_ID, RAM_SECTION_IDSTR, 0, RAM_SECTION_VERSION)
    headers.write_section_header(out, start)
    planned, position = [], out.position + 8  # the total stands in front of the first entry
    for block in blocks:
        entry = RamSetupBlock(block.idstr, block.used_length)
        planned.append(plan_mapped_ram(entry, position, TARGET_PAGE_BYTES))
        mapped = planned[-1].mapped_ram
        assert mapped is not None
        position = mapped.pages_offset + block.used_length

    def pages(entry: RamSetupBlock) -> None:
        assert entry.mapped_ram is not None
        fd = files[entry.idstr]
        out.write(_bitmap(fd, entry.used_length))
        out.skip_to(entry.mapped_ram.pages_offset)
        out.file(fd, entry.used_length)

    write_ram_setup(out, RamSetup(tuple(planned)), skip_pages=pages)
    headers.write_footer(out, _RAM_ID)
    _write_end(out)


def _write_end(out: Writer) -> None:
    end = SectionHeader(SectionType.END, _RAM_ID, RAM_SECTION_IDSTR, 0, RAM_SECTION_VERSION)
    headers.write_section_header(out, end)
    out.write(RamFlag.EOS.to_bytes(8, "big"))
    headers.write_footer(out, _RAM_ID)


def _bitmap(fd: int, used_length: int) -> bytes:
    page_count = align_up(used_length, TARGET_PAGE_BYTES) >> TARGET_PAGE_BITS
    present = Bitmap(page_count)
    for start, end in data_extents(fd, used_length):
        first = start >> TARGET_PAGE_BITS
        present.set(first, (align_up(end, TARGET_PAGE_BYTES) >> TARGET_PAGE_BITS) - first)
    return present.to_bytes().ljust(bitmap_bytes(page_count), b"\0")
