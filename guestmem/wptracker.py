"""Dirty tracking by asynchronous write protection: any memory, no KVM needed."""

import os

from guestmem._native import ffi, lib
from guestmem.bitmap import Bitmap
from guestmem.dirty import BlockTracker, BlockWriteLog, TrackerKind
from guestmem.errors import DirtyTrackingError
from guestmem.geometry import TARGET_PAGE_BITS, TARGET_PAGE_BYTES
from guestmem.ramblock import RAMBlock
from guestmem.ramlist import RAMList
from guestmem.wpregister import register_block

_O_FLAGS = os.O_CLOEXEC | os.O_NONBLOCK
_USER_MODE_ONLY = 1
_PROTECT = 1 << 0
_FEATURE_WP_HUGETLBFS_SHMEM = 1 << 12
_FEATURE_WP_UNPOPULATED = 1 << 13
_FEATURE_WP_ASYNC = 1 << 15
_FEATURES = _FEATURE_WP_ASYNC | _FEATURE_WP_UNPOPULATED | _FEATURE_WP_HUGETLBFS_SHMEM


class WpAsyncTracker(BlockTracker):
    """Sees every write through our page tables: vCPU threads, KVM guests, system calls.

    Each page is write-protected; the kernel drops the protection at the first write and lets the
    writer go on, without a message to anybody. PAGEMAP_SCAN finds such pages and protects them
    again in one step. Absent pages are protected too, so the first sync reports what was written
    and nothing else; a page discarded by :meth:`RAMBlock.discard` counts as written too.

    Seen: writes through every mapping the block had at :meth:`start`, aliases included. Not seen:
    mappings made later or by other processes, ``write(2)`` to the file, and devices that write
    to pinned pages. Those need :meth:`note_written`.

    Costs: start and each sync walk the page tables (a few ms per GiB); the first write to a page
    after a sync costs about 1 us more; page tables exist for all of RAM from the start on, and
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
        for mapping in log.block.mappings:
            result = lib.uffd_writeprotect(
                self._uffd, mapping.host, log.block.placed_length, _PROTECT
            )
            _check(result, f"write-protecting {log.block!r}")

    def _collect(self, log: BlockWriteLog) -> None:
        pages = ffi.cast("uint64_t *", log.found.address)
        for mapping in log.block.mappings:
            result = lib.pagescan_collect(
                self._pagemap,
                mapping.host,
                log.block.placed_length,
                pages,
                log.found.nbits,
                TARGET_PAGE_BITS,
            )
            _check(result, f"scanning {log.block!r}")


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
