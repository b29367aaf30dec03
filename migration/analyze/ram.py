"""RAM records: the be64 words, names and page data inside ``ram`` sections and preempt channels.

:func:`iter_ram_records` is the one place that knows their layout here; it yields a
:class:`RamRecord` for each and checks everything that needs no guest: known block, page inside it,
known flags, lengths of encoded pages, that zlib and XBZRLE data really make one page.

Source: QEMU ``migration/ram.c`` (``ram_load_precopy``, ``ram_load_postcopy``).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

from migration.wire.constants import RAM_FLAGS_MASK, RAM_SECTION_IDSTR, XBZRLE_ENCODING, RamFlag
from migration.wire.errors import RemoteStreamError
from migration.wire.fields import read_be16, read_be32, read_be64, read_name, read_u8
from migration.wire.ram_setup import RamSetupBlock

from .image import BlockImage
from .pagemap import BlockState, PageState, RamMap
from .source import Source
from .xbzrle import XbzrleError, check_xbzrle

_CONTINUE = int(RamFlag.CONTINUE)
_EOS = int(RamFlag.EOS)
_PAGE = int(RamFlag.PAGE)
_ZERO = int(RamFlag.ZERO)


ImageFactory = Callable[[BlockState], BlockImage | None]


class RamRecord(NamedTuple):
    """One record.

    :ivar kind: ZERO, PAGE, XBZRLE, COMPRESS_PAGE, MULTIFD_FLUSH or EOS; without CONTINUE.
    :ivar block: None for MULTIFD_FLUSH and EOS.
    :ivar offset: bytes from the start of the block.
    :ivar position: file offset of the record.
    :ivar payload: what the record brings: the page (PAGE, COMPRESS_PAGE after decompression), the
        delta (XBZRLE), the fill byte (ZERO); empty unless data were asked for, except for the
        delta.
    :ivar payload_length: bytes of data on the wire, without the record's word and name.
    """

    kind: RamFlag
    block: BlockState | None
    offset: int
    position: int
    payload: bytes
    payload_length: int


class RamChannel:
    """What lives from record to record of one channel: the block that CONTINUE refers to."""

    def __init__(self, ram: RamMap) -> None:
        self.ram = ram
        self.last: BlockState | None = None


class RamCollector:
    """What the records add up to: counts and maps of every block, and content where wanted.

    :param image_for: called once per block of the block list; gives a file for the block's content,
        or None when it is not wanted.
    :ivar images: the files, by block name.
    """

    def __init__(self, image_for: ImageFactory | None = None) -> None:
        self.map = RamMap()
        self.images: dict[str, BlockImage] = {}
        self._image_for = image_for

    def add(self, entry: RamSetupBlock) -> BlockState:
        """Take over one entry of the block list."""
        block = self.map.add(entry)
        image = None if self._image_for is None else self._image_for(block)
        if image is not None:
            self.images[block.idstr] = image
        return block

    @property
    def wants_data(self) -> bool:
        """Page data is needed, not only passed over."""
        return bool(self.images)

    def take(self, record: RamRecord) -> None:
        """Account for one record of a ``ram`` section or a preempt channel."""
        block = record.block
        if block is None:
            return
        if record.kind is RamFlag.ZERO:
            self.take_zero(block, record.offset)
        elif record.kind is RamFlag.XBZRLE:
            block.counts.xbzrle += 1
            block.sent(record.offset // block.target_page_bytes, PageState.DATA)
            image = self.images.get(block.idstr)
            if image is not None:
                image.apply(record.offset, record.payload, block.target_page_bytes)
        else:
            block.counts.compressed += record.kind is RamFlag.COMPRESS_PAGE
            self.take_page(block, record.offset, record.payload)

    def take_page(self, block: BlockState, offset: int, data: bytes | memoryview) -> None:
        """One page with data; ``data`` may be empty when :attr:`wants_data` is false."""
        block.counts.normal += 1
        block.sent(offset // block.target_page_bytes, PageState.DATA)
        image = self.images.get(block.idstr)
        if image is not None:
            image.put(offset, data)

    def take_zero(self, block: BlockState, offset: int) -> None:
        """One zero page. In the image it stays a hole unless data was sent before."""
        block.counts.zero += 1
        index = offset // block.target_page_bytes
        image = self.images.get(block.idstr)
        if image is not None and (block.states is None or block.states[index] & PageState.DATA):
            image.put(offset, bytes(block.target_page_bytes))
        block.sent(index, PageState.ZERO)


def iter_ram_records(
    source: Source,
    channel: RamChannel,
    *,
    want_data: bool = False,
    may_end: bool = False,
) -> Iterator[RamRecord]:
    """Records up to and with the next EOS.

    :param want_data: fill in the payload of PAGE and COMPRESS_PAGE records.
    :param may_end: a preempt channel: it may just end between two records.
    :raises RemoteStreamError: what is there is no legal record; the offset is the record's.
    """
    while True:
        position = source.position
        if may_end and source.at_end():
            return
        word = read_be64(source)
        flags = word & RAM_FLAGS_MASK
        kind = flags & ~_CONTINUE
        if kind == _EOS or kind == RamFlag.MULTIFD_FLUSH:
            if word != kind:
                raise _bad(f"record {word:#x}", position)
            yield RamRecord(RamFlag(kind), None, 0, position, b"", 0)
            if kind == _EOS:
                return
            continue
        if kind not in _READERS:
            raise _bad(_explain(word, flags), position)
        if not flags & _CONTINUE:
            channel.last = _read_block(source, channel.ram, position)
        block = channel.last
        offset = word - flags
        if block is None:
            raise _bad("a record continues a block, but none was named before", position)
        if offset >= block.used_length:
            raise _bad(
                f"page {offset:#x} is past the end of block {block.idstr!r} "
                f"({block.used_length:#x} bytes)",
                position,
            )
        if offset % block.target_page_bytes:
            raise _bad(f"offset {offset:#x} is not a target page's", position)
        payload, length = _READERS[kind](source, block, want_data)
        yield RamRecord(RamFlag(kind), block, offset, position, payload, length)


def _read_block(source: Source, ram: RamMap, position: int) -> BlockState:
    idstr = read_name(source, "block name", section=source.section)
    block = ram.get(idstr)
    if block is None:
        raise _bad(f"page of unknown block {idstr!r}", position)
    return block


def _read_page(source: Source, block: BlockState, want_data: bool) -> tuple[bytes, int]:
    length = block.target_page_bytes
    if want_data:
        return source.read(length), length
    source.skip(length)
    return b"", length


def _read_zero(source: Source, block: BlockState, want_data: bool) -> tuple[bytes, int]:
    position = source.position
    fill = source.read(1)
    if fill != b"\0":
        raise _bad(f"zero record with fill byte {fill[0]:#04x}", position)
    return fill, 1


def _read_xbzrle(source: Source, block: BlockState, want_data: bool) -> tuple[bytes, int]:
    position = source.position
    encoding = read_u8(source)
    length = read_be16(source)
    if encoding != XBZRLE_ENCODING:
        raise _bad(f"XBZRLE encoding {encoding:#04x}", position)
    if length > block.target_page_bytes:
        raise _bad(f"XBZRLE delta of {length} bytes", position)
    delta = source.read(length)
    try:
        check_xbzrle(delta, block.target_page_bytes)
    except XbzrleError as error:
        raise _bad(str(error), position + 3 + error.at) from None
    return delta, 3 + length


def _read_compressed(source: Source, block: BlockState, want_data: bool) -> tuple[bytes, int]:
    position = source.position
    length = read_be32(source)
    # The worst case of deflate is a little more than the page; the bound is generous.
    if not 0 < length <= 2 * block.target_page_bytes:
        raise _bad(f"compressed page of {length} bytes", position)
    data = source.read(length)
    unpack = zlib.decompressobj()
    try:
        page = unpack.decompress(data, block.target_page_bytes + 1)
    except zlib.error as error:
        raise _bad(f"compressed page is damaged: {error}", position) from None
    if len(page) != block.target_page_bytes or unpack.unused_data or not unpack.eof:
        raise _bad(f"compressed page of {len(page)} bytes or with a rest", position)
    return page if want_data else b"", 4 + length


_READERS = {
    _PAGE: _read_page,
    _ZERO: _read_zero,
    int(RamFlag.XBZRLE): _read_xbzrle,
    int(RamFlag.COMPRESS_PAGE): _read_compressed,
}


def _explain(word: int, flags: int) -> str:
    if flags & RamFlag.MEM_SIZE:
        return f"record {word:#x}: a block list outside the START section"
    if flags & RamFlag.HOOK:
        return f"record {word:#x}: an RDMA hook, which only means something on RDMA"
    return f"record {word:#x} has unknown flags {flags:#05x}"


def _bad(reason: str, offset: int) -> RemoteStreamError:
    return RemoteStreamError(reason, offset=offset, section=RAM_SECTION_IDSTR)
