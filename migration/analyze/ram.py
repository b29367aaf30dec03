"""RAM records: the be64 words, names and page data inside ``ram`` sections and preempt channels.

The heads are decoded by the data plane's own C codec, so there is one. :func:`iter_ram_records`
yields a :class:`RamRecord` for each and checks everything that needs no guest: known block, page
inside it, lengths of encoded pages, that zlib and XBZRLE data really make one page.

Source: QEMU ``migration/ram.c`` (``ram_load_precopy``, ``ram_load_postcopy``).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple, NoReturn, Protocol

from migration.native import ffi, lib
from migration.wire.constants import RAM_FLAGS_MASK, RAM_SECTION_IDSTR, XBZRLE_ENCODING, RamFlag
from migration.wire.errors import RemoteStreamError
from migration.wire.fields import decode_name
from migration.wire.ram_setup import RamSetupBlock

from .image import BlockImage
from .pagemap import BlockState, PageState, RamMap
from .source import Source
from .xbzrle import XbzrleError, check_xbzrle

_HEAD_BYTES_MAX = 8 + 1 + 255 + 4
"""Word, block name, the longest head of a kind."""
_KINDS = {int(flag): flag for flag in RamFlag}
_EOS = int(RamFlag.EOS)
_MULTIFD_FLUSH = int(RamFlag.MULTIFD_FLUSH)


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
    :ivar is_named: the block's name stands in the record; else it continues the last one's block.
    """

    kind: RamFlag
    block: BlockState | None
    offset: int
    position: int
    payload: bytes
    payload_length: int
    is_named: bool = False


class RecordHead(Protocol):
    """``struct ramrec`` of the data plane's codec (``migration/native/csrc/ramrec.h``)."""

    fill: int
    payload_len: int


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
    head = ffi.new("struct ramrec *")
    while True:
        position = source.position
        if may_end and source.at_end():
            return
        ahead = source.peek(_HEAD_BYTES_MAX)
        result = lib.ramrec_decode(ahead, len(ahead), head)
        if result <= 0:
            _fail(source, ahead, result, position)
        kind = head.kind
        if kind in (_EOS, _MULTIFD_FLUSH):
            source.skip(head.head_len)
            yield RamRecord(_KINDS[kind], None, 0, position, b"", 0)
            if kind == _EOS:
                return
            continue
        if kind not in _READERS:
            raise _bad(_explain(ahead), position)
        if head.has_id:
            name = ahead[head.id_at : head.id_at + head.id_len]
            channel.last = _find_block(channel.ram, name, position)
        block = channel.last
        offset = head.offset
        if block is None:
            raise _bad("a record continues a block, but none was named before", position)
        if offset >= block.used_length or offset % block.target_page_bytes:
            raise _bad(
                f"page {offset:#x} of block {block.idstr!r}, which has {block.used_length:#x} "
                f"bytes in pages of {block.target_page_bytes:#x}",
                position,
            )
        source.skip(head.head_len)
        payload, length = _READERS[kind](source, block, head, want_data)
        named = bool(head.has_id)
        yield RamRecord(_KINDS[kind], block, offset, position, payload, length, named)


def _fail(source: Source, ahead: bytes, result: int, position: int) -> NoReturn:
    """Raise what ``ramrec_decode`` could not decode: too few bytes, or no legal record."""
    if result == 0:
        source.read(len(ahead) + 1)  # raises the error of a stream that ends here
    raise _bad(_explain(ahead), position)


def _find_block(ram: RamMap, name: bytes, position: int) -> BlockState:
    idstr = decode_name(name, "block name", offset=position + 9, section=RAM_SECTION_IDSTR)
    block = ram.get(idstr)
    if block is None:
        raise _bad(f"page of unknown block {idstr!r}", position)
    return block


def _read_page(
    source: Source, block: BlockState, head: RecordHead, want_data: bool
) -> tuple[bytes, int]:
    length = block.target_page_bytes
    if want_data:
        return source.read(length), length
    source.skip(length)
    return b"", length


def _read_zero(
    source: Source, block: BlockState, head: RecordHead, want_data: bool
) -> tuple[bytes, int]:
    if head.fill:
        raise _bad(f"zero record with fill byte {head.fill:#04x}", source.position - 1)
    return b"", 0


def _read_xbzrle(
    source: Source, block: BlockState, head: RecordHead, want_data: bool
) -> tuple[bytes, int]:
    position, length = source.position, head.payload_len
    if head.fill != XBZRLE_ENCODING:
        raise _bad(f"XBZRLE encoding {head.fill:#04x}", position - 3)
    if length > block.target_page_bytes:
        raise _bad(f"XBZRLE delta of {length} bytes", position - 2)
    delta = source.read(length)
    try:
        check_xbzrle(delta, block.target_page_bytes)
    except XbzrleError as error:
        raise _bad(str(error), position + error.at) from None
    return delta, length


def _read_compressed(
    source: Source, block: BlockState, head: RecordHead, want_data: bool
) -> tuple[bytes, int]:
    position, length = source.position, head.payload_len
    # The worst case of deflate is a little more than the page; the bound is generous.
    if not 0 < length <= 2 * block.target_page_bytes:
        raise _bad(f"compressed page of {length} bytes", position - 4)
    data = source.read(length)
    unpack = zlib.decompressobj()
    try:
        page = unpack.decompress(data, block.target_page_bytes + 1)
    except zlib.error as error:
        raise _bad(f"compressed page is damaged: {error}", position) from None
    if len(page) != block.target_page_bytes or unpack.unused_data or not unpack.eof:
        raise _bad(f"compressed page of {len(page)} bytes or with a rest", position)
    return page if want_data else b"", length


_READERS = {
    int(RamFlag.PAGE): _read_page,
    int(RamFlag.ZERO): _read_zero,
    int(RamFlag.XBZRLE): _read_xbzrle,
    int(RamFlag.COMPRESS_PAGE): _read_compressed,
}


def _explain(ahead: bytes) -> str:
    word = int.from_bytes(ahead[:8], "big")
    flags = word & RAM_FLAGS_MASK
    if flags & RamFlag.MEM_SIZE:
        return f"record {word:#x}: a block list outside the START section"
    if flags & RamFlag.HOOK:
        return f"record {word:#x}: an RDMA hook, which only means something on RDMA"
    if flags & ~RamFlag.CONTINUE in _READERS:
        return f"record {word:#x} with an empty block name"
    return f"record {word:#x} is none: flags {flags:#05x}"


def _bad(reason: str, offset: int) -> RemoteStreamError:
    return RemoteStreamError(reason, offset=offset, section=RAM_SECTION_IDSTR)
