"""The page areas of a mapped-ram file: each block's bitmap, then its pages at fixed offsets.

Read front to back like everything else: bitmap, gap, pages. Source: QEMU
``docs/devel/migration/mapped-ram.rst``.
"""

from __future__ import annotations

from collections.abc import Callable

from migration.wire.constants import RAM_SECTION_IDSTR
from migration.wire.errors import RemoteStreamError
from migration.wire.ram_setup import RamSetupBlock

from .pagemap import PAGE_MAP_BYTES_MAX, BlockState, PageState
from .ram import RamCollector
from .source import Source

_BYTE_STATES = [
    bytes(PageState.DATA if byte >> bit & 1 else PageState.ZERO for bit in range(8))
    for byte in range(256)
]
_COPY_BYTES = 1 << 20
PutPage = Callable[[int, bytes], None]


def read_block_area(source: Source, entry: RamSetupBlock, ram: RamCollector) -> None:
    """From right behind the block's header to right behind its last page.

    The bitmap is the first thing there, so offsets are taken relative to it: that also holds for a
    stream which was cut out of a larger file.

    :raises RemoteStreamError: the block is larger than the analyser maps, or the file ends before.
    """
    header = entry.mapped_ram
    assert header is not None
    start = source.position
    block = ram.add(entry)
    bitmap_bytes = -(-block.page_count // 64) * 8
    if header.page_size != block.target_page_bytes or bitmap_bytes > PAGE_MAP_BYTES_MAX:
        raise RemoteStreamError(
            f"block {entry.idstr!r} of {entry.used_length:#x} bytes in pages of "
            f"{header.page_size:#x}",
            offset=start,
            section=RAM_SECTION_IDSTR,
        )
    bitmap = source.read(bitmap_bytes)
    source.skip(header.pages_offset - header.bitmap_offset - bitmap_bytes)
    _count(block, bitmap)
    if block.idstr in ram.images:
        _copy(source, block, bitmap, ram)
    else:
        source.skip(block.used_length)


def _count(block: BlockState, bitmap: bytes) -> None:
    """A page whose bit is clear is a hole and reads as zeros."""
    bits = int.from_bytes(bitmap, "little") & ((1 << block.page_count) - 1)
    block.counts.normal += bits.bit_count()
    block.counts.zero += block.page_count - bits.bit_count()
    if block.states is not None:
        states = b"".join(_BYTE_STATES[byte] for byte in bitmap)
        block.states[:] = states[: block.page_count]


def _copy(source: Source, block: BlockState, bitmap: bytes, ram: RamCollector) -> None:
    image = ram.images[block.idstr]
    offset = 0
    while offset < block.used_length:
        index = offset // block.target_page_bytes
        end = min(offset + _COPY_BYTES, block.used_length)
        first, last = index // 8, -(-end // block.target_page_bytes) // 8 + 1
        if not any(bitmap[first:last]):
            source.skip(end - offset)
        else:
            _copy_pages(source.read(end - offset), offset, block, bitmap, image.put)
        offset = end


def _copy_pages(data: bytes, offset: int, block: BlockState, bitmap: bytes, put: PutPage) -> None:
    size = block.target_page_bytes
    for at in range(0, len(data), size):
        index = (offset + at) // size
        if bitmap[index // 8] >> (index % 8) & 1:
            put(offset + at, data[at : at + size])
