"""Multifd channels: 64 bytes of greeting, then packets of page lists with their data.

A page can travel over any channel, so order between channels only exists at the SYNC packets:
:meth:`MultifdChannel.run_to_sync` stops there, and the main stream goes on when all channels did.

Source: QEMU ``migration/multifd.c`` (``MultiFDInit_t``, ``MultiFDPacket_t``).
"""

from __future__ import annotations

import struct
import uuid
import zlib
from typing import IO, Protocol, cast

from migration.wire.constants import (
    MULTIFD_FLAG_DEVICE_STATE,
    MULTIFD_FLAG_METHODS,
    MULTIFD_FLAG_SYNC,
    MULTIFD_MAGIC,
    MULTIFD_PACKET_BYTES,
    MULTIFD_PACKET_SLOTS,
    MULTIFD_VERSION,
)
from migration.wire.errors import RemoteStreamError
from migration.wire.fields import decode_name, read_be32

from .pagemap import BlockState
from .ram import RamCollector
from .source import Source

try:
    import zstandard
except ImportError:  # an optional dependency: without it such data are passed over
    zstandard = None  # type: ignore[assignment]

_PACKET = struct.Struct(">IIIIIIQI28x256s")
_DEVICE_HEAD = struct.Struct(">256sII")
_METHODS = {0: "none", 0x2: "zlib", 0x4: "zstd", 0x8: "qpl", 0x10: "uadk", 0x20: "qatzip"}
_DEVICE_STATE_BYTES_MAX = 1 << 30
_SLACK_BYTES = 65536
"""How much longer than its pages the compressed data of a packet may be."""


class _Unpacker(Protocol):
    def unpack(self, data: bytes, length: int) -> bytes:
        """``length`` bytes out of ``data``, which continues the stream of this channel."""
        ...


class _Zlib:
    """One zlib stream runs for the life of a channel; a packet is one flushed piece of it."""

    def __init__(self) -> None:
        self._stream = zlib.decompressobj()

    def unpack(self, data: bytes, length: int) -> bytes:
        try:
            pages = self._stream.decompress(data, length + 1)
        except zlib.error as error:
            raise ValueError(f"zlib data is damaged: {error}") from None
        if len(pages) != length or self._stream.unconsumed_tail or self._stream.unused_data:
            raise ValueError(f"zlib data does not make {length} bytes")
        return pages


class _Zstd:
    """As zlib. Reading through a stream reader bounds what a small packet can unfold to."""

    def __init__(self) -> None:
        self._data = b""
        self._reader = zstandard.ZstdDecompressor().stream_reader(
            cast(IO[bytes], self), read_across_frames=False
        )

    def read(self, length: int = -1) -> bytes:
        """The stream reader's source: the rest of the packet; more would be another packet's."""
        if not self._data:
            raise EOFError
        data, self._data = self._data, b""
        return data

    def unpack(self, data: bytes, length: int) -> bytes:
        self._data = data
        try:
            pages = self._reader.read(length)
        except (EOFError, zstandard.ZstdError):
            raise ValueError(f"zstd data does not make {length} bytes") from None
        if len(pages) != length or self._data:
            raise ValueError(f"zstd data does not make {length} bytes")
        return pages


class MultifdChannel:
    """One multifd channel.

    :ivar channel: number the source gave it.
    :ivar methods: compression methods seen, by name.
    """

    def __init__(self, source: Source, ram: RamCollector) -> None:
        self.source = source
        self.channel = -1
        self.uuid: uuid.UUID | None = None
        self.packets = 0
        self.syncs = 0
        self.normal = 0
        self.zero = 0
        self.device_states = 0
        self.methods: set[str] = set()
        self.undecoded_bytes = 0
        self._ram = ram
        self._unpackers: dict[str, _Unpacker] = {}

    def read_greeting(self) -> None:
        """The first 64 bytes.

        :raises RemoteStreamError: not a multifd channel.
        """
        source = self.source
        source.section = "multifd greeting"
        self._check_magic()
        vm = uuid.UUID(bytes=source.read(16))
        self.uuid = vm if vm.int else None
        self.channel = source.read(1)[0]
        source.skip(39)
        source.section = f"multifd channel {self.channel}"

    def summary(self) -> dict[str, object]:
        """Counts for the channel's line."""
        values: dict[str, object] = {
            "packets": self.packets,
            "syncs": self.syncs,
            "methods": sorted(self.methods),
            "pages": {"normal": self.normal, "zero": self.zero},
        }
        if self.uuid is not None:
            values["uuid"] = str(self.uuid)
        if self.device_states:
            values["device_states"] = self.device_states
        if self.undecoded_bytes:
            values["undecoded_bytes"] = self.undecoded_bytes
        return values

    def run_to_sync(self) -> bool:
        """Read packets up to and with the next one that carries SYNC.

        :returns: False when the channel ended first.
        :raises RemoteStreamError: a damaged packet, or the channel ends inside one.
        """
        while not self.source.at_end():
            if self._read_packet():
                return True
        return False

    def run_to_end(self) -> None:
        """Read all packets that are left."""
        while self.run_to_sync():
            pass

    def _read_packet(self) -> bool:
        start = self.source.position
        head = self.source.peek(12)
        if len(head) == 12 and int.from_bytes(head[8:], "big") & MULTIFD_FLAG_DEVICE_STATE:
            return self._read_device_state()
        self._check_magic()
        rest = self.source.read(MULTIFD_PACKET_BYTES - 8)
        _, _, flags, _, normal, size, _, zero, name = _PACKET.unpack_from(b"\0" * 8 + rest)
        if normal + zero > MULTIFD_PACKET_SLOTS:
            raise self._bad(f"packet of {normal} + {zero} pages", start)
        method = _METHODS.get(flags & MULTIFD_FLAG_METHODS)
        if method is None or flags & ~(MULTIFD_FLAG_SYNC | MULTIFD_FLAG_METHODS):
            raise self._bad(f"packet flags {flags:#x}", start)
        self.packets += 1
        if normal or zero:
            self.methods.add(method)
            block = self._find_block(name, start)
            count = normal + zero
            offsets = struct.unpack_from(f">{count}Q", rest, _PACKET.size - 8)
            self._check_offsets(block, offsets, start)
            self._take(block, offsets[:normal], offsets[normal:], method, size)
        is_sync = bool(flags & MULTIFD_FLAG_SYNC)
        self.syncs += is_sync
        return is_sync

    def _take(
        self,
        block: BlockState,
        normal: tuple[int, ...],
        zero: tuple[int, ...],
        method: str,
        size: int,
    ) -> None:
        page_bytes = block.target_page_bytes
        data = b""
        if normal:  # without, QEMU 7.2 leaves a stale size in the packet and sends no data
            data = self._read_data(len(normal) * page_bytes, method, size)
        for index, offset in enumerate(normal):
            page = memoryview(data)[index * page_bytes : (index + 1) * page_bytes]
            self._ram.take_page(block, offset, page)
        for offset in zero:
            self._ram.take_zero(block, offset)
        self.normal += len(normal)
        self.zero += len(zero)
        block.counts.multifd += len(normal) + len(zero)

    def _read_data(self, length: int, method: str, size: int) -> bytes:
        start = self.source.position
        if method == "none":
            if size != length:
                raise self._bad(f"{size} bytes of data for {length} bytes of pages", start)
            if self._ram.wants_data:
                return self.source.read(size)
            self.source.skip(size)
            return b""
        if not 0 < size <= length + _SLACK_BYTES:
            raise self._bad(f"{size} bytes of compressed data for {length} bytes of pages", start)
        data = self.source.read(size)
        unpacker = self._unpacker(method)
        if unpacker is None:
            self.undecoded_bytes += size
            return b""
        try:
            return unpacker.unpack(data, length)
        except ValueError as error:
            raise self._bad(str(error), start) from None

    def _unpacker(self, method: str) -> _Unpacker | None:
        if method == "zlib":
            return self._unpackers.setdefault(method, _Zlib())
        if method == "zstd" and zstandard is not None:
            return self._unpackers.setdefault(method, _Zstd())
        return None

    def _read_device_state(self) -> bool:
        start = self.source.position
        self._check_magic()
        flags = read_be32(self.source)
        _, _, size = _DEVICE_HEAD.unpack(self.source.read(_DEVICE_HEAD.size))
        if size > _DEVICE_STATE_BYTES_MAX:
            raise self._bad(f"device state of {size} bytes", start)
        self.source.skip(size)
        self.packets += 1
        self.device_states += 1
        return bool(flags & MULTIFD_FLAG_SYNC)

    def _check_magic(self) -> None:
        start = self.source.position
        magic, version = read_be32(self.source), read_be32(self.source)
        if magic != MULTIFD_MAGIC or version != MULTIFD_VERSION:
            raise self._bad(f"no multifd packet (magic {magic:#010x}, version {version})", start)

    def _find_block(self, name: bytes, start: int) -> BlockState:
        idstr = decode_name(
            name.rstrip(b"\0"), "block name", offset=start + 64, section=self.source.section
        )
        block = self._ram.map.get(idstr)
        if block is None:
            raise self._bad(f"pages of unknown block {idstr!r}", start)
        return block

    def _check_offsets(self, block: BlockState, offsets: tuple[int, ...], start: int) -> None:
        for index, offset in enumerate(offsets):
            if offset >= block.used_length or offset % block.target_page_bytes:
                raise self._bad(
                    f"page {offset:#x} of block {block.idstr!r} ({block.used_length:#x} bytes)",
                    start + _PACKET.size + 8 * index,
                )

    def _bad(self, reason: str, offset: int) -> RemoteStreamError:
        return RemoteStreamError(reason, offset=offset, section=self.source.section)
