"""Dirty tracking by asynchronous write protection: any memory, no KVM needed."""

import os
from collections.abc import Iterator

from guestmem._native import ffi, lib
from guestmem.backings import Backing
from guestmem.bitmap import Bitmap
from guestmem.dirty import BlockTracker, BlockWriteLog, TrackerKind
from guestmem.errors import DirtyTrackingError
from guestmem.geometry import TARGET_PAGE_BITS, TARGET_PAGE_BYTES, THP_BYTES
from guestmem.ramblock import RAMBlock
from guestmem.ramlist import RAMList
from guestmem.residency import data_ranges
from guestmem.wpregister import register_block

_O_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_USER_MODE_ONLY = 1
_PROTECT = 1 << 0
_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
_FEATURE_WP_UNPOPULATED = 1 << 13
_FEATURE_WP_ASYNC = 1 << 15
# What one page table maps on x86-64.
_PAGE_TABLE_BYTES = THP_BYTES
_FEATURES = _FEATURE_WP_ASYNC | _FEATURE_WP_UNPOPULATED | _FEATURE_WP_HUGETLBFS_SHMEM


class WpAsyncTracker(BlockTracker):
    """Sees every write through our page tables: vCPU threads, KVM guests, system calls.

    Each page is write-protected; the kernel drops the protection at the first write and lets the
    writer go on, without a message to anybody. PAGEMAP_SCAN finds such pages and protects them
    again in one step. Absent pages that share a page table with present ones are protected too; in
    the large holes of a sparse block (2 MiB and more) the first touch of a page counts as a write,
    even if it only reads. A page discarded by :meth:`RAMBlock.discard` counts as written too.

    Seen: writes through every mapping the block had at :meth:`start`, aliases included. Not seen:
    mappings made later or by other processes, ``write(2)`` to the file, and devices that write
    to pinned pages. Those need :meth:`note_written`.

    Costs: start and each sync walk the page tables (a few ms per GiB); the first write to a page
    after a sync costs about 1 us more; page tables are made for what exists, not for holes, and
    anonymous huge pages are split where they are written.

    One userfaultfd context per range at a time: the incoming migration's must be closed first.
    Needs no privilege: asynchronous protection is resolved inside the kernel, also for faults in
    kernel mode, so a user-mode-only userfaultfd is enough.

    Source: kernel ``Documentation/admin-guide/mm/{userfaultfd,pagemap}.rst``; Linux 6.7.
    """

    kind = TrackerKind.WP_ASYNC

    def __init__(self, ram: RAMList) -> None:
        super().__init__(ram)
        self._uffd = -1
        self._pagemap = -1

    @staticmethod
    def works_here() -> bool:
        """Whether this kernel can do it, tried on a page of memory of its own."""
        with RAMBlock.allocate("try", TARGET_PAGE_BYTES) as block:
            tracker, into = WpAsyncTracker(RAMList([block])), {"try": Bitmap(block.page_count)}
            try:
                tracker.start()
                block.write(0, b"x")
                return tracker.sync(into) == 1
            except DirtyTrackingError:
                return False
            finally:
                tracker.stop()

    def start(self) -> None:
        """Register every mapping of every block and protect all pages.

        :raises TrackingBusy: another userfaultfd holds a block (``EBUSY``).
        :raises DirtyTrackingError: the kernel lacks a feature (``EINVAL``, before Linux 6.7, or
            memory that cannot be tracked), or anything else it refuses. All is undone then.
        """
        self._start_logs()
        try:
            self._uffd = _open_uffd()
            self._pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
            for log in self._logs.values():
                register_block(self._uffd, log.block)
            for log in self._logs.values():
                self._protect(log)
        except BaseException:
            self.stop()
            raise

    def sync(self, into: dict[str, Bitmap]) -> int:
        """See :class:`~guestmem.dirty.DirtyTracker`. The GIL is released while tables are walked.

        :raises DirtyTrackingError: ``EPERM`` if a mapping lost its protection mode.
        """
        fresh = 0
        for log, bitmap in self._bitmaps_for(into):
            self._collect(log)
            fresh += log.hand_over(bitmap)
        return fresh

    def stop(self) -> None:
        """Unregister (the kernel drops all protection) and close. Harmless when not started."""
        for fd in (self._uffd, self._pagemap):
            if fd >= 0:
                os.close(fd)
        self._uffd = self._pagemap = -1
        self._stop_logs()

    def _protect(self, log: BlockWriteLog) -> None:
        # Not by a scan: that leaves the holes of hugetlb unprotected, and a read that fills such
        # a hole would then pass for a write.
        for start, end in self._parts(log.block):
            for mapping in log.block.mappings:
                result = lib.uffd_writeprotect(
                    self._uffd, mapping.host + start, end - start, _PROTECT
                )
                _check(result, f"write-protecting {log.block!r}")

    def _collect(self, log: BlockWriteLog) -> None:
        block, pages = log.block, ffi.cast("uint64_t *", log.found.address)
        is_private = block.backing is Backing.ANON
        # Of private memory the page tables tell which pages there are, quickly for an empty range.
        parts = [(0, block.placed_length)] if is_private else list(self._parts(block))
        for start, end in parts:
            for mapping in block.mappings:
                result = lib.pagescan_collect(
                    self._pagemap,
                    mapping.host,
                    mapping.host + start,
                    end - start,
                    pages,
                    log.found.nbits,
                    TARGET_PAGE_BITS,
                    is_private,
                )
                _check(result, f"scanning {block!r}")

    def _parts(self, block: RAMBlock) -> Iterator[tuple[int, int]]:
        """``(start, end)`` of what exists, in pieces of one page table: to protect the holes of a
        sparse block would take a page table for each 2 MiB of them."""
        if block.backing is Backing.ANON:
            populated = block.populated(whole_pages=True)
            populated.widen(_PAGE_TABLE_BYTES >> TARGET_PAGE_BITS)
            for first, count in populated.runs():
                yield first << TARGET_PAGE_BITS, (first + count) << TARGET_PAGE_BITS
        elif block.backing is Backing.MEMFD and block.fd is not None:
            yield from data_ranges(block.fd, block.placed_length, _PAGE_TABLE_BYTES)
        else:
            yield 0, block.placed_length


def _open_uffd() -> int:
    fd = _check(lib.uffd_open_syscall(_O_FLAGS | _USER_MODE_ONLY), "userfaultfd")
    out = ffi.new("uint64_t[2]")
    result = lib.uffd_api(fd, _FEATURES, out, out + 1)
    if result < 0:
        os.close(fd)
        missing = "this kernel's userfaultfd has no asynchronous write protection (Linux 6.7)"
        _check(result, missing)
    return fd


def _check(result: int, what: str) -> int:
    if result < 0:
        raise DirtyTrackingError(-result, what)
    return result
