"""RAM in QEMU's mapped-ram layout: each page at a fixed place of the file, so it can be mapped.

The START section names each block with a 28-byte header; behind it comes a bitmap of the pages that
are there, and from a multiple of 1 MiB on the pages themselves. What is zero is a hole: the file is
as long as RAM and as large as what is in it. Positions count from the start of the **file**, as in
QEMU. Source: QEMU ``docs/devel/migration/mapped-ram.rst``, ``migration/ram.c``.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass

from guestmem import Bitmap, RAMBlock, RAMList
from guestmem.geometry import TARGET_PAGE_BYTES
from migration.native import ffi, lib
from migration.wire.constants import RAM_SECTION_IDSTR, RamFlag
from migration.wire.errors import RemoteStreamError, TruncatedStreamError
from migration.wire.io import Reader
from migration.wire.ram_setup import (
    RamSetup,
    RamSetupBlock,
    plan_mapped_ram,
    read_ram_setup,
    write_ram_setup,
)

from ..channel_ops import ChannelOps
from ..file_channel import FileReader, FileWriter
from .files import write_at

CAPABILITY = "mapped-ram"
_PIECE_PAGES = 16 << 10
_WORD_BYTES = 8
_WORD_BITS = 64

KeepGoing = Callable[[], None]
"""Called between pieces; raises when nobody wants the rest."""


def file_ops(fd: int, *, name: str) -> ChannelOps:
    """A regular file as a channel whose positions are the file's. Does not close it."""
    return ChannelOps(
        put_buffer=lambda data, position: os.pwrite(fd, data, position),
        get_buffer=lambda position, length: os.pread(fd, length, position),
        name=name,
    )


def bitmap_bytes(page_count: int) -> int:
    """Bytes of a block's bitmap in the file: whole words."""
    return -(-page_count // _WORD_BITS) * _WORD_BYTES


def write_setup(writer: FileWriter, ram: RAMList) -> tuple[RamSetupBlock, ...]:
    """The payload of the START section, leaving room for bitmaps and pages.

    :returns: the blocks with their headers: where :func:`write_pages` writes.
    """
    planned: list[RamSetupBlock] = []
    position = writer.position + _WORD_BYTES  # the total stands in front of the first entry
    for block in ram:
        entry = plan_mapped_ram(
            RamSetupBlock(block.idstr, block.used_length), position, TARGET_PAGE_BYTES
        )
        planned.append(entry)
        position = _end(entry)
    setup = RamSetup(tuple(planned))
    write_ram_setup(writer, setup, skip_pages=lambda entry: writer.seek(_end(entry)))
    return setup.blocks


def _end(entry: RamSetupBlock) -> int:
    """Position right behind a block's last page."""
    assert entry.mapped_ram is not None
    return entry.mapped_ram.pages_offset + entry.used_length


def write_pages(fd: int, block: RAMBlock, entry: RamSetupBlock, keep_going: KeepGoing) -> int:
    """A block's pages and then its bitmap; target pages written. Releases the GIL.

    :raises OSError: write(2) failed.
    """
    assert entry.mapped_ram is not None
    present, written = Bitmap(block.page_count), 0
    for first in range(0, block.page_count, _PIECE_PAGES):
        keep_going()
        count = min(_PIECE_PAGES, block.page_count - first)
        result = lib.mapped_write(
            fd, block.host, entry.mapped_ram.pages_offset, first, count, _words(present)
        )
        written += _checked(int(result))
    bits = present.to_bytes().ljust(bitmap_bytes(block.page_count), b"\0")
    write_at(fd, bits, entry.mapped_ram.bitmap_offset)
    return written


def write_end_of_list(writer: FileWriter) -> None:
    """The payload of a PART or END section: nothing but the end of the list."""
    writer.write(RamFlag.EOS.to_bytes(8, "big"))


def read_end_of_list(reader: Reader) -> None:
    """The inverse; a file that multifd wrote has a flush in front of the end.

    :raises RemoteStreamError: RAM records, which cannot be in such a file.
    """
    at = reader.position
    while (word := int.from_bytes(reader.read(8), "big")) != RamFlag.EOS:
        if word != RamFlag.MULTIFD_FLUSH:
            raise RemoteStreamError(
                f"RAM record {word:#x} in a mapped-ram file", offset=at, section=RAM_SECTION_IDSTR
            )
        at = reader.position


@dataclass(frozen=True, slots=True)
class MappedArea:
    """Where one block's bitmap and pages really lie, as positions in the file."""

    idstr: str
    used_length: int
    bitmap_at: int
    pages_at: int

    @property
    def page_count(self) -> int:
        """Target pages."""
        return -(-self.used_length // TARGET_PAGE_BYTES)

    def read_bitmap(self, fd: int) -> Bitmap:
        """A bit per target page that is in the file; the others are zero.

        :raises TruncatedStreamError: the file ends before. :raises RemoteStreamError: bits past the
            end of the block.
        """
        length = bitmap_bytes(self.page_count)
        data = os.pread(fd, length, self.bitmap_at)
        if len(data) < length:
            raise TruncatedStreamError(
                f"the bitmap of block {self.idstr!r} is cut short",
                offset=self.bitmap_at,
                section=RAM_SECTION_IDSTR,
            )
        used = (self.page_count + 7) // 8
        try:
            if any(data[used:]):
                raise ValueError("bits behind the last page")
            return Bitmap.from_bytes(data[:used], self.page_count)
        except ValueError as error:
            raise RemoteStreamError(
                f"the bitmap of block {self.idstr!r}: {error}",
                offset=self.bitmap_at,
                section=RAM_SECTION_IDSTR,
            ) from None


def read_setup(reader: FileReader) -> tuple[RamSetup, tuple[MappedArea, ...]]:
    """The payload of the START section. The reader's positions are the file's.

    A header's positions are the file's at the time of writing; read relative to the header itself
    they also hold where the stream was moved to.

    :raises RemoteStreamError: no such list, or pages of another size.
    """
    areas: list[MappedArea] = []

    def skip(entry: RamSetupBlock) -> None:
        header = entry.mapped_ram
        assert header is not None
        if header.page_size != TARGET_PAGE_BYTES:
            raise RemoteStreamError(
                f"block {entry.idstr!r} in pages of {header.page_size} bytes, here they have "
                f"{TARGET_PAGE_BYTES}",
                offset=reader.position,
                section=RAM_SECTION_IDSTR,
            )
        moved = reader.position - header.bitmap_offset
        area = MappedArea(
            entry.idstr, entry.used_length, reader.position, header.pages_offset + moved
        )
        areas.append(area)
        reader.seek(area.pages_at + area.used_length)

    setup = read_ram_setup(reader, has_mapped_ram=True, skip_pages=skip)
    return setup, tuple(areas)


def read_pages(fd: int, block: RAMBlock, area: MappedArea, keep_going: KeepGoing) -> int:
    """Fill a block, which must be all zero, from the file; target pages read. Releases the GIL.

    :raises TruncatedStreamError: the file ends before. :raises OSError: read(2) failed.
    """
    present, got = area.read_bitmap(fd), 0
    for first in range(0, area.page_count, _PIECE_PAGES):
        keep_going()
        count = min(_PIECE_PAGES, area.page_count - first)
        result = int(lib.mapped_read(fd, block.host, area.pages_at, first, count, _words(present)))
        if result == -errno.ENODATA:
            raise TruncatedStreamError(
                f"the pages of block {area.idstr!r} are cut short",
                offset=os.fstat(fd).st_size,
                section=RAM_SECTION_IDSTR,
            )
        got += _checked(result)
    return got


def _words(bitmap: Bitmap) -> object:
    return ffi.cast("uint64_t *", bitmap.address)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(-result, os.strerror(-result))
    return result
