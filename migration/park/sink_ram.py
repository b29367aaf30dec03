"""The RAM of one incoming stream that nobody runs on: pages go to memory or files as they come."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from guestmem import Bitmap
from guestmem.geometry import TARGET_PAGE_BITS, TARGET_PAGE_BYTES, align_up
from migration.native import ffi, lib
from migration.runtime.channel import Channel
from migration.runtime.errors import MigrationError, native_error
from migration.wire.commands import RamDiscard
from migration.wire.errors import RemoteStreamError


@dataclass(frozen=True, slots=True)
class SinkBlock:
    """Where a block's pages go: memory at ``host``, or (host 0) the file ``fd``."""

    idstr: str
    used_length: int
    page_size: int
    host: int
    fd: int


class SinkRam:
    """Blocks, what has come of them, and the native object that reads pages.

    :ivar native: ``struct dst *``.
    :ivar received: per block a bit per target page that came. :ivar requested: that was asked for.
    """

    def __init__(self, channel: Channel, blocks: Sequence[SinkBlock], section_id: int) -> None:
        """:param section_id: of the source's RAM section; stays the same after a recovery.

        :raises MigrationError: a block cannot be kept.
        """
        self.received: list[Bitmap] = []
        self.requested: list[Bitmap] = []
        self.section_id = section_id
        self.is_postcopy = False
        self._names = [block.idstr for block in blocks]
        err = ffi.new("int *")
        self.native: Any = lib.dst_new(channel.native, len(blocks), TARGET_PAGE_BYTES, err)
        if not self.native:
            raise MemoryError("the list of RAM blocks")
        for index, block in enumerate(blocks):
            self._set_block(index, block)
        lib.dst_seal(self.native)
        lib.dst_set_sink(self.native, ffi.NULL)
        lib.dst_set_ram_section(self.native, section_id)

    def _set_block(self, index: int, block: SinkBlock) -> None:
        length = align_up(block.used_length, TARGET_PAGE_BYTES)
        self.received.append(Bitmap(length >> TARGET_PAGE_BITS))
        self.requested.append(Bitmap(length >> TARGET_PAGE_BITS))
        result = lib.dst_set_block(
            self.native, index, block.idstr.encode(), block.host, length, TARGET_PAGE_BYTES,
            self.received[index].address, self.requested[index].address, block.fd, 0, 0,
        )  # fmt: skip
        if result < 0:
            raise MigrationError(f"RAM block {block.idstr!r} cannot be kept (errno {-result})")

    @property
    def received_by_name(self) -> dict[str, Bitmap]:
        """What a source that comes back asks for."""
        return dict(zip(self._names, self.received, strict=True))

    @property
    def missing_pages(self) -> int:
        """Target pages that have not come."""
        return int(lib.dst_missing_pages(self.native))

    def load_section(self) -> None:
        """One section's records, before postcopy. :raises Exception: bad bytes, or it broke."""
        if lib.dst_load_ram(self.native) < 0:
            raise native_error(self.native.main.error, fallback="loading RAM")

    def begin_postcopy(self, run_fd: int) -> None:
        """The package has come. :param run_fd: an eventfd when RUN comes alone, else -1."""
        self.is_postcopy = True
        lib.dst_start_postcopy(self.native, -1, -1, run_fd, 0, 0, 0)

    def listen(self, channel: Channel) -> None:
        """Everything up to the end of the stream. :raises Exception: as :meth:`load_section`."""
        event = lib.dst_listen_loop(self.native)
        if event < 0:
            raise native_error(self.native.main.error, fallback="taking in RAM")
        if event != 0:
            raise RemoteStreamError("something else than RAM", offset=channel.position)

    def move_to(self, channel: Channel) -> None:
        """Read from a new channel."""
        lib.dst_set_channel(self.native, channel.native)

    def ask_again(self) -> None:
        """What was asked for and has not come. :raises MigrationError: the channel broke."""
        if lib.dst_request_again(self.native) < 0:
            raise MigrationError("asking again for pages failed")

    def tell_arrivals(self, fd: int) -> None:
        """Write this eventfd whenever pages have come; -1: no more."""
        lib.dst_set_arrival_fd(self.native, fd)

    def ask(self, index: int, offset: int, length: int) -> None:
        """Any thread, in postcopy: have the source send this soon. Asks once for each page."""
        if not self.requested[index].test_and_set(offset >> TARGET_PAGE_BITS):
            # A broken channel shows where it is read; after a recovery it is asked for again.
            lib.dst_ask(self.native, index, offset, length)

    def take_back(self, command: RamDiscard, at: int) -> list[tuple[int, int, int]]:
        """The source takes pages back: ``(index, start, length)`` of those that had come.

        :raises RemoteStreamError: of no block, or beyond its end.
        """
        if command.idstr not in self._names:
            raise RemoteStreamError(f"discard in unknown RAM block {command.idstr!r}", offset=at)
        index = self._names.index(command.idstr)
        length = len(self.received[index]) << TARGET_PAGE_BITS
        had_come = []
        for each in command.ranges:
            if (each.start | each.length) % TARGET_PAGE_BYTES or each.start + each.length > length:
                raise RemoteStreamError(
                    f"discard of [{each.start:#x}, +{each.length:#x}) in {command.idstr}", offset=at
                )
            first, count = each.start >> TARGET_PAGE_BITS, each.length >> TARGET_PAGE_BITS
            if self.received[index].count(first, count):
                had_come.append((index, each.start, each.length))
            self.received[index].clear(first, count)
        return had_come

    def close(self) -> None:
        """Free the native object. No loop may be running."""
        native, self.native = self.native, None
        if native is not None:
            lib.dst_free(native)
