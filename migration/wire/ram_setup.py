"""The block list: the payload of the ``ram`` section's START.

    be64 total | 0x4
    per block: u8 length, name, be64 used length
               [be64 host page size]      postcopy advised, host page is no target page
               [be64 guest address]       capability x-ignore-shared
               [mapped-ram header]        capability mapped-ram; the file jumps past the page area
    [be64 0x200]                          multifd with the flush rule of QEMU 8.1 and later
    be64 0x10

The list has no count: it ends when the used lengths add up to the total. Nothing says whether the
optional words are there; QEMU's reader knows from its own blocks. This one needs no such knowledge,
because the words tell themselves apart: a host page size is a power of two that the ADVISE summary
contains, so its first byte is 0, while the next entry starts with a name length of at least 1 and
the closing words are smaller than a page. A receiver must still compare
:attr:`RamSetupBlock.page_size` with its own block.

Source: QEMU ``migration/ram.c`` (``ram_save_setup``, ``parse_ramblocks``,
``mapped_ram_setup_ramblock``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .constants import (
    MAPPED_RAM_HEADER_BYTES,
    MAPPED_RAM_PAGES_ALIGNMENT,
    MAPPED_RAM_VERSION,
    RAM_BLOCK_BYTES_MAX,
    RAM_BLOCKS_MAX,
    RAM_FLAGS_MASK,
    RAM_SECTION_IDSTR,
    RamFlag,
)
from .errors import LocalStreamError, RemoteStreamError
from .fields import counted_name, read_be32, read_be64, read_name, unsigned
from .io import Reader, Writer


@dataclass(frozen=True, slots=True)
class MappedRamHeader:
    """Where the pages of one block lie in a mapped-ram file. All offsets count from the start of
    the file.

    :ivar page_size: bytes per bit of the bitmap.
    :ivar bitmap_offset: bitmap of pages present: ``ceil(pages / 64) * 8`` bytes, little-endian
        bits.
    :ivar pages_offset: multiple of 1 MiB; the page at offset o of the block lies at ``pages_offset
        + o``.
    """

    page_size: int
    bitmap_offset: int
    pages_offset: int


@dataclass(frozen=True, slots=True)
class RamSetupBlock:
    """One RAM block as the source announces it.

    :ivar used_length: bytes that may be sent.
    :ivar page_size: host page size in bytes; None when the stream leaves it out (then it is the
        target page size).
    :ivar gpa: guest physical address, only with x-ignore-shared.
    """

    idstr: str
    used_length: int
    page_size: int | None = None
    gpa: int | None = None
    mapped_ram: MappedRamHeader | None = None


@dataclass(frozen=True, slots=True)
class RamSetup:
    """The whole list. ``total`` is the sum of the used lengths, bytes."""

    blocks: tuple[RamSetupBlock, ...]
    multifd_flush: bool = False

    @property
    def total(self) -> int:
        """Sum of the used lengths, bytes."""
        return sum(block.used_length for block in self.blocks)


SkipPages = Callable[[RamSetupBlock], None]
"""Called after each mapped-ram header; must leave the reader or writer just past the block's page
area."""


def write_ram_setup(
    writer: Writer, setup: RamSetup, *, skip_pages: SkipPages | None = None
) -> None:
    """Write the whole payload of the START section, its EOS included.

    :param skip_pages: required when blocks carry mapped-ram headers: seeks the file past the
        block's page area.
    :raises LocalStreamError: a value does not fit; ``total`` is not target-page aligned (its low
        bits carry the flag).
    """
    total = setup.total
    if total & RAM_FLAGS_MASK:
        raise LocalStreamError(f"total RAM {total:#x} is not a multiple of the target page")
    writer.write(unsigned(total | RamFlag.MEM_SIZE, 8, "total RAM"))
    for block in setup.blocks:
        writer.write(_encode_block(block))
        if block.mapped_ram is not None:
            _require_skip(skip_pages)(block)
    if setup.multifd_flush:
        writer.write(RamFlag.MULTIFD_FLUSH.to_bytes(8, "big"))
    writer.write(RamFlag.EOS.to_bytes(8, "big"))


def read_ram_setup(
    reader: Reader,
    *,
    page_sizes_summary: int = 0,
    has_addresses: bool = False,
    has_mapped_ram: bool = False,
    skip_pages: SkipPages | None = None,
) -> RamSetup:
    """Read the whole payload of the START section, its EOS included.

    :param page_sizes_summary: from the ADVISE command; 0 when none came, then no block carries a
        page size.
    :param has_addresses: capability x-ignore-shared was announced in the configuration.
    :param has_mapped_ram: capability mapped-ram was announced in the configuration.
    :raises RemoteStreamError: the list is no such list, lengths do not add up, a block comes twice.
    """
    at = reader.position
    word = read_be64(reader)
    if word & RAM_FLAGS_MASK != RamFlag.MEM_SIZE:
        raise _bad(f"record {word:#x} where the block list should be", at)
    total = word & ~RAM_FLAGS_MASK
    blocks: dict[str, RamSetupBlock] = {}
    listed = 0
    while listed < total:
        at = reader.position
        block = _read_block(reader, page_sizes_summary, has_addresses, has_mapped_ram)
        if block.idstr in blocks:
            raise _bad(f"block {block.idstr!r} listed twice", at)
        if len(blocks) == RAM_BLOCKS_MAX:
            raise _bad(f"more than {RAM_BLOCKS_MAX} blocks", at)
        listed += block.used_length
        if listed > total:
            raise _bad(f"block {block.idstr!r} passes the total of {total:#x} bytes", at)
        blocks[block.idstr] = block
        if block.mapped_ram is not None:
            _require_skip(skip_pages)(block)
    return RamSetup(tuple(blocks.values()), multifd_flush=_read_end(reader))


def plan_mapped_ram(block: RamSetupBlock, file_offset: int, page_size: int) -> RamSetupBlock:
    """``block`` with the header it gets when its entry is written at ``file_offset`` of a
    mapped-ram file.

    :param page_size: target page size, bytes: the bitmap's granule.
    """
    entry = len(_encode_block(block)) + MAPPED_RAM_HEADER_BYTES
    bitmap_offset = file_offset + entry
    page_count = -(-block.used_length // page_size)
    end = bitmap_offset + -(-page_count // 64) * 8
    pages_offset = -(-end // MAPPED_RAM_PAGES_ALIGNMENT) * MAPPED_RAM_PAGES_ALIGNMENT
    header = MappedRamHeader(page_size, bitmap_offset, pages_offset)
    return RamSetupBlock(block.idstr, block.used_length, block.page_size, block.gpa, header)


def _encode_block(block: RamSetupBlock) -> bytes:
    if block.used_length >= RAM_BLOCK_BYTES_MAX:
        raise LocalStreamError(f"block {block.idstr!r} of {block.used_length:#x} bytes")
    out = counted_name(block.idstr, "block name")
    out += unsigned(block.used_length, 8, "used length")
    if block.page_size is not None:
        out += unsigned(block.page_size, 8, "page size")
    if block.gpa is not None:
        out += unsigned(block.gpa, 8, "guest address")
    if block.mapped_ram is not None:
        header = block.mapped_ram
        out += MAPPED_RAM_VERSION.to_bytes(4, "big")
        out += unsigned(header.page_size, 8, "page size")
        out += unsigned(header.bitmap_offset, 8, "bitmap offset")
        out += unsigned(header.pages_offset, 8, "pages offset")
    return out


def _read_block(
    reader: Reader, page_sizes_summary: int, has_addresses: bool, has_mapped_ram: bool
) -> RamSetupBlock:
    idstr = read_name(reader, "block name", section=RAM_SECTION_IDSTR)
    at = reader.position
    used_length = read_be64(reader)
    if used_length >= RAM_BLOCK_BYTES_MAX:
        raise _bad(f"block {idstr!r} of {used_length:#x} bytes", at)
    page_size: int | None = None
    if _page_size_follows(reader, page_sizes_summary, has_addresses):
        page_size = read_be64(reader)
    gpa = read_be64(reader) if has_addresses else None
    header = _read_mapped_header(reader, idstr, used_length) if has_mapped_ram else None
    return RamSetupBlock(idstr, used_length, page_size, gpa, header)


def _page_size_follows(reader: Reader, page_sizes_summary: int, has_addresses: bool) -> bool:
    # No further than the list goes for sure: with multifd nothing may follow it until the channels
    # have met.
    ahead = reader.peek(8)
    word = int.from_bytes(ahead, "big")
    if len(ahead) < 8 or word <= RAM_FLAGS_MASK + 1:
        return False
    if word & (word - 1) or not word & page_sizes_summary:
        return False
    if not has_addresses:
        return True
    # With addresses a block at guest address 2 MiB looks the same; then a page size is one only if
    # a second word, the address, follows it, rather than the next name or the end of the list.
    ahead = reader.peek(16)
    return ahead[8:9] == b"\0" and not _ends_list(ahead[8:16])


def _ends_list(word: bytes) -> bool:
    return int.from_bytes(word, "big") in (RamFlag.EOS, RamFlag.MULTIFD_FLUSH)


def _read_mapped_header(reader: Reader, idstr: str, used_length: int) -> MappedRamHeader:
    at = reader.position
    version = read_be32(reader)
    if version != MAPPED_RAM_VERSION:
        raise _bad(f"mapped-ram header of version {version} for {idstr!r}", at)
    header = MappedRamHeader(read_be64(reader), read_be64(reader), read_be64(reader))
    if header.page_size == 0 or header.page_size & (header.page_size - 1):
        raise _bad(f"mapped-ram page size {header.page_size:#x} for {idstr!r}", at)
    page_count = -(-used_length // header.page_size)
    bitmap_end = header.bitmap_offset + -(-page_count // 64) * 8
    if not bitmap_end <= header.pages_offset <= RAM_BLOCK_BYTES_MAX:
        raise _bad(
            f"mapped-ram bitmap at {header.bitmap_offset:#x} and pages at "
            f"{header.pages_offset:#x} for {idstr!r}",
            at,
        )
    return header


def _read_end(reader: Reader) -> bool:
    at = reader.position
    word = read_be64(reader)
    has_flush = word == RamFlag.MULTIFD_FLUSH
    if has_flush:
        at = reader.position
        word = read_be64(reader)
    if word != RamFlag.EOS:
        raise _bad(f"record {word:#x} where the block list should end", at)
    return has_flush


def _require_skip(skip_pages: SkipPages | None) -> SkipPages:
    if skip_pages is None:
        raise LocalStreamError("mapped-ram needs a seekable file")
    return skip_pages


def _bad(reason: str, offset: int) -> RemoteStreamError:
    return RemoteStreamError(reason, offset=offset, section=RAM_SECTION_IDSTR)
