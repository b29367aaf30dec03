"""Guest RAM on the source: what is dirty, and the native object that sends it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import Enum

from guestmem import Bitmap, DirtyTracker, RAMBlock, RAMList
from guestmem.geometry import TARGET_PAGE_BITS, TARGET_PAGE_BYTES
from migration.native import ffi, lib
from migration.wire.commands import (
    DiscardRange,
    RamDiscard,
    RamZero,
    split_discards,
    split_zeros,
)
from migration.wire.constants import SectionType
from migration.wire.ram_setup import RamSetup, RamSetupBlock

from ..channel import Channel
from ..errors import native_error

ZERO_RUN_PAGES = 16
"""Shorter holes are not worth 16 bytes of range and a look at them: they are sent as zero pages."""


class ZeroDetection(Enum):
    """``enum src_zero``: who looks whether a page is zero."""

    NONE = 0
    RECORDS = 1
    """Who puts the record: zero pages go over the main channel."""
    MULTIFD = 2
    """The threads of the multifd channels: zero pages are named in their packets."""


def choose_zero_detection(
    how: str, *, over_multifd: bool, is_known_to_read: bool
) -> tuple[ZeroDetection, ZeroDetection]:
    """What parameter ``zero-page-detection`` means, while no page goes out twice, and afterwards.

    A stock destination before QEMU 9.0 passes over zero pages in packets. Of a page that was never
    sent that does no harm; the others go over the main channel, which all understand.

    :param over_multifd: packets may name zero pages at all.
    :param is_known_to_read: the destination is known to look at them.
    """
    if how == "none":
        return ZeroDetection.NONE, ZeroDetection.NONE
    if how != "multifd" or not over_multifd:
        return ZeroDetection.RECORDS, ZeroDetection.RECORDS
    later = ZeroDetection.MULTIFD if is_known_to_read else ZeroDetection.RECORDS
    return ZeroDetection.MULTIFD, later


class SourceRam:
    """The RAM of one outgoing migration.

    :ivar dirty: per block a bit per target page that must be sent (again); starts full, since a
        page never sent must be sent as well.
    :ivar nothing_sent: no precopy came before: at the switchover everything is discarded, in one
        range a block, and the dirty bitmaps stay as they are.
    :ivar sync_ns: time spent asking the kernel what was written, all syncs together.
    :ivar hole_pages: target pages never written that are told of instead of sent.
    :ivar is_end_sent: the END section is out, or a part of it: the destination may have all of RAM.
    :ivar native: ``struct src *``. :ivar last_statistics: of a closed one.
    """

    def __init__(self, ram: RAMList, channel: Channel, tracker: DirtyTracker) -> None:
        self.ram = ram
        self.dirty = {block.idstr: Bitmap(block.placed_length >> TARGET_PAGE_BITS) for block in ram}
        self._tracker = tracker
        self._found = {block.idstr: Bitmap(block.page_count) for block in ram}
        self._discarded = {idstr: Bitmap(bits.nbits) for idstr, bits in self.dirty.items()}
        self._pushed: list[Bitmap] = []
        self._wanted: list[Bitmap] = []
        self._arrived: Sequence[Bitmap] = ()
        self.sync_count = 0
        self.sync_ns = 0
        self.hole_pages = 0
        self.last_statistics: dict[str, int] = {}
        self.nothing_sent = False
        self.is_end_sent = False
        self._left_out: frozenset[str] = frozenset()
        self._zero_later = ZeroDetection.RECORDS
        self._has_addresses = False
        err = ffi.new("int *")
        self.native = lib.src_new(channel.native, len(ram), err)
        if not self.native:
            raise MemoryError(f"sending {len(ram)} RAM blocks (errno {-err[0]})")
        for index, block in enumerate(ram):
            bitmap = self.dirty[block.idstr]
            bitmap.fill()
            result = lib.src_set_block(
                self.native, index, block.idstr.encode(), block.host, block.placed_length,
                block.page_size, bitmap.address,
            )  # fmt: skip
            if result < 0:
                raise ValueError(f"{block!r}: {result}")
        self._left = sum(bits.nbits for bits in self.dirty.values())

    @property
    def page_sizes_summary(self) -> int:
        """The host page sizes of all blocks or-ed together, bytes: what ADVISE announces."""
        summary = 0
        for block in self.ram:
            summary |= block.page_size
        return summary

    def leave_out(self, blocks: Iterable[RAMBlock], *, has_addresses: bool = False) -> None:
        """The destination has the memory of these blocks itself: nothing of them is sent.

        :param has_addresses: the block list tells where each block lies (``x-ignore-shared``).
        """
        self._left_out |= {block.idstr for block in blocks}
        self._has_addresses = has_addresses
        for idstr in self._left_out:
            self.dirty[idstr].clear_all()
        self._left = int(lib.src_dirty_pages(self.native))

    @property
    def is_all_left_out(self) -> bool:
        """There is no RAM to send, so none to track."""
        return len(self._left_out) == len(self.ram)

    @property
    def populated_bytes(self) -> int:
        """Bytes of pages that hold something now, zero pages left out; looks, touches nothing."""
        sent = [block for block in self.ram if block.idstr not in self._left_out]
        return sum(block.populated().count() for block in sent) << TARGET_PAGE_BITS

    def leave_out_holes(self) -> Iterator[RamZero]:
        """Pages never written are clean at once, and told of. The tracker must have started: what
        is written from then on is dirty again by its next sync."""
        for block in self.ram:
            if block.idstr in self._left_out:
                continue
            unit = block.page_size // TARGET_PAGE_BYTES
            populated = block.populated(whole_pages=True)
            yield from split_zeros(block.idstr, self._holes(block, populated, unit))
        self._left = int(lib.src_dirty_pages(self.native))

    def _holes(self, block: RAMBlock, populated: Bitmap, unit: int) -> Iterator[DiscardRange]:
        dirty = self.dirty[block.idstr]
        position = 0
        while (first := populated.next_clear(position)) < populated.nbits:
            position = populated.next_set(first)
            count = position - first
            if count < max(ZERO_RUN_PAGES, unit):
                continue
            dirty.clear(first, count)
            self.hole_pages += count
            yield DiscardRange(first << TARGET_PAGE_BITS, count << TARGET_PAGE_BITS)

    def push_only(self, scans: Mapping[str, Bitmap]) -> None:
        """In postcopy push only these pages unasked; the others are known to be zero, which they
        are at the destination too unless it asks. The bitmaps are used up."""
        for index, block in enumerate(self.ram):
            self._pushed.append(scans[block.idstr])
            lib.src_set_scan(self.native, index, scans[block.idstr].address)

    def release_sent(self) -> None:
        """Capability ``release-ram``: in postcopy give pages back to the host once they are sent
        and the guest cannot come back."""
        for index, block in enumerate(self.ram):
            lib.src_set_release(self.native, index, -1 if block.fd is None else block.fd)

    def use_xbzrle(self, cache_bytes: int) -> None:
        """Capability ``xbzrle``. :raises MemoryError: no room for the cache."""
        if lib.src_xbzrle_init(self.native, cache_bytes) < 0:
            raise MemoryError(f"an xbzrle cache of {cache_bytes >> 20} MiB")

    def detect_zero(self, first: ZeroDetection, later: ZeroDetection) -> None:
        """Who looks for zero pages: while no page goes out a second time, and from then on."""
        lib.src_set_zero_detection(self.native, first.value)
        self._zero_later = later

    def pass_done(self) -> None:
        """A whole pass is through: from now on pages may go out as differences."""
        lib.src_xbzrle_activate(self.native)

    def setup(self, *, has_page_sizes: bool, has_flush: bool = False) -> RamSetup:
        """The block list of the START section; page sizes only with postcopy, as QEMU does.

        :param has_flush: multifd channels meet here, and at such marks only.
        """
        blocks = []
        for block, address in self.ram.with_guest_addresses():
            page_size = block.page_size if block.page_size != TARGET_PAGE_BYTES else None
            sent_size = page_size if has_page_sizes else None
            sent_address = address if self._has_addresses else None
            blocks.append(RamSetupBlock(block.idstr, block.used_length, sent_size, sent_address))
        return RamSetup(tuple(blocks), multifd_flush=has_flush)

    def sync(self) -> int:
        """Ask the kernel what was written since the last time; target pages that turned dirty.

        :raises ChannelError: a multifd channel broke.
        """
        self._let_channels_meet()
        began_ns = time.monotonic_ns()
        self.sync_count += 1
        if self.is_all_left_out:
            return 0
        newly = self._take_found() if self._tracker.sync(self._found) else 0
        self._left += newly
        lib.src_set_zero_detection(self.native, self._zero_later.value)
        self.sync_ns += time.monotonic_ns() - began_ns
        return newly

    def _let_channels_meet(self) -> None:
        """What went out over multifd channels has come before any of it goes out again."""
        if lib.src_multifd_flush(self.native) < 0:
            raise native_error(self.native.error, fallback="multifd channels")

    def _take_found(self) -> int:
        newly = 0
        for block in self.ram:
            found = self._found[block.idstr]
            if block.idstr not in self._left_out:
                newly += self.dirty[block.idstr].or_with(found)
            found.clear_all()
        return newly

    @property
    def precopy_bytes_left(self) -> int:
        """Bytes of dirty pages before postcopy, by book-keeping: nothing is counted, however large
        RAM is."""
        return max(0, self._left) << TARGET_PAGE_BITS

    @property
    def remaining_bytes(self) -> int:
        """Bytes of the pages still to be sent."""
        if self._pushed:
            return sum(scan.count() for scan in self._pushed) << TARGET_PAGE_BITS
        return int(lib.src_dirty_pages(self.native)) << TARGET_PAGE_BITS

    def send_part(self, max_bytes: int, *, last: bool = False) -> int:
        """One PART (or the END) section with up to ``max_bytes`` of records; target pages sent.

        :raises ChannelError: the connection broke.
        """
        kind = SectionType.END if last else SectionType.PART
        self.is_end_sent = last
        sent = lib.src_send_part(self.native, kind, max_bytes)
        if sent < 0:
            raise native_error(self.native.error, fallback="sending RAM")
        self._left -= int(sent)
        return int(sent)

    def widen(self) -> None:
        """A host page with one dirty target page is dirty as a whole: it is discarded, asked for,
        sent and placed as one. At least one page is left dirty: a stock destination needs a
        discard that names a range."""
        if self.nothing_sent:
            return
        for block in self.ram:
            self.dirty[block.idstr].widen(block.page_size // TARGET_PAGE_BYTES)
        if not any(bitmap.count() for bitmap in self.dirty.values()):
            first = next(iter(self.ram))
            self.dirty[first.idstr].set(0, first.page_size // TARGET_PAGE_BYTES)

    def discards(self) -> Iterator[RamDiscard]:
        """The dirty runs of every block (written again or never sent, the destination drops both)
        that no earlier call gave."""
        for block in self.ram:
            if self.nothing_sent:
                yield RamDiscard(block.idstr, (DiscardRange(0, block.placed_length),))
                continue
            runs = (
                DiscardRange(first << TARGET_PAGE_BITS, count << TARGET_PAGE_BITS)
                for first, count in self._not_discarded(block).runs()
            )
            yield from split_discards(block.idstr, runs)

    def _not_discarded(self, block: RAMBlock) -> Bitmap:
        """Dirty and not discarded before; counts as discarded from now on."""
        discarded, dirty = self._discarded[block.idstr], self.dirty[block.idstr]
        news = dirty.copy()
        news.and_not(discarded)
        discarded.or_with(dirty)
        return news

    def relay_from(self, upstream: object, received: Sequence[Bitmap]) -> None:
        """Send what has come to ``upstream`` (``struct dst *``, its blocks in the same order), and
        ask it for what is asked of us before it has come.

        :param received: what is there now. Nothing may come while this is set up.
        """
        for index, block in enumerate(self.ram):
            dirty = self.dirty[block.idstr]
            dirty.clear_all()
            dirty.or_with(received[index])
            # What comes as zero from now on is sent only when asked for.
            self._pushed.append(dirty.copy())
            lib.src_set_scan(self.native, index, self._pushed[index].address)
            wanted = Bitmap(dirty.nbits)
            self._wanted.append(wanted)
            lib.src_set_wanted(self.native, index, wanted.address)
        self._arrived = received
        lib.src_set_upstream(self.native, upstream)
        lib.src_set_more_coming(self.native, True)
        lib.dst_set_sink(upstream, self.native)

    def push_zeros(self) -> None:
        """Undo what :meth:`push_only` and :meth:`relay_from` leave out: a destination that counts
        pages wants each of them. Before the postcopy loop; pages may come from upstream
        meanwhile, since they are dirty before they are anything else."""
        for index, block in enumerate(self.ram):
            lib.src_set_scan(self.native, index, self.dirty[block.idstr].address)

    def send_again(self, received: Mapping[str, Bitmap]) -> None:
        """After a pause: what the destination has not received is dirty, whatever we sent. What it
        is not to be sent unasked stays so."""
        self.is_end_sent = False
        for index, block in enumerate(self.ram):
            dirty = self.dirty[block.idstr]
            has = received[block.idstr]
            if self._arrived:
                self._send_lost(index, dirty, has)
                continue
            if self._pushed:
                # Sent but lost pages belong to the scan again; never populated ones do not.
                lost = has.copy()
                lost.complement_of(has)
                lost.and_not(dirty)
                self._pushed[index].or_with(lost)
            dirty.complement_of(has)

    def _send_lost(self, index: int, dirty: Bitmap, has: Bitmap) -> None:
        """What has come from upstream and was sent, but did not get through; what has not come is
        no one's to send. Atomically: more comes while we look."""
        lost = self._arrived[index].copy()
        lost.and_not(has)
        lost.and_not(dirty)
        for first, count in lost.runs():
            self._pushed[index].set_atomic(first, count)
            dirty.set_atomic(first, count)

    def upstream_ended(self) -> None:
        """Everything has come: what is left to send is what is dirty now."""
        lib.src_set_more_coming(self.native, False)

    def statistics(self) -> dict[str, int]:
        """Counters of ``struct src_stats`` by name."""
        out = ffi.new("struct src_stats *")
        lib.src_get_stats(self.native, out)
        names = (
            "pages_normal", "pages_zero", "postcopy_pages", "requests", "requested_pages",
            "duplicate_requests", "advised_pages", "served_direct", "run_sent_ns",
            "xbzrle_pages", "xbzrle_bytes", "xbzrle_misses", "xbzrle_overflows", "xbzrle_same",
            "released_pages",
        )  # fmt: skip
        return {name: int(getattr(out, name)) for name in names}

    def close(self) -> None:
        """Free the native object; :attr:`last_statistics` stay. No loop may be running."""
        if self.native is not None:
            self.last_statistics = self.statistics()
            native, self.native = self.native, None
            lib.src_free(native)
