"""Dirty tracking by synchronous write protection: for kernels without the asynchronous kind."""

import errno
import os
import threading
from typing import Any

from guestmem._native import ffi, lib
from guestmem.bitmap import Bitmap
from guestmem.dirty import BlockTracker, BlockWriteLog, TrackerKind
from guestmem.errors import DirtyTrackingError
from guestmem.geometry import TARGET_PAGE_BITS
from guestmem.ramlist import RAMList
from guestmem.wpregister import register_block
from uffd import Feature, Opening, UffdError
from uffd.opening import Way, handshake, kernel_support, open_fd
from uffd.threads import NamedThread


class WpSyncTracker(BlockTracker):
    """Sees every write through our page tables, by a message for each first write to a page.

    A native thread answers: it records the page and takes the protection off. It needs no
    interpreter, so a Python thread that writes while it holds the GIL goes on, too. While a
    collector protects again, writers wait; that is done in steps of 4096 target pages.

    Seen and not seen: as with :class:`~guestmem.WpAsyncTracker`, but memory mapped anew behind
    the tracker's back is only noticed when a page of it is to be protected again.

    Costs: a first write after a sync waits for another thread (5 to 100 us, against 1 us of the
    asynchronous kind); a sync costs a system call for each run of written pages, but reads no page
    tables. On kernels before 6.4 holes in anonymous memory cannot be protected, so all of it is
    populated with zero pages at the start.

    Kernel-mode writes (``read(2)`` into guest RAM, KVM) are served only with a userfaultfd that
    is not restricted to user mode; with a restricted one such system calls fail with EFAULT.

    Source: kernel ``Documentation/admin-guide/mm/userfaultfd.rst``; Linux 5.7, shared memory 5.19.
    """

    kind = TrackerKind.WP_SYNC

    def __init__(
        self, ram: RAMList, *, user_mode_only: bool | None = None, may_protect_holes: bool = True
    ) -> None:
        """:param user_mode_only: None falls back to it when nothing else is allowed; ``False``
            never does (KVM needs that).
        :param may_protect_holes: ``False`` behaves as on a kernel before 6.4.
        """
        super().__init__(ram)
        self._user_mode_only = user_mode_only
        self._may_protect_holes = may_protect_holes
        self._uffd = self._stop_fd = -1
        self._native: Any = None
        self._ranges: Any = None
        self._parts: dict[str, tuple[int, int]] = {}
        self._noted: dict[str, Bitmap] = {}
        self._written: dict[str, Bitmap] = {}
        self._thread: threading.Thread | None = None
        self.opening: Opening | None = None

    def start(self) -> None:
        """Register every mapping of every block, start the handler, protect all pages.

        :raises TrackingBusy: another userfaultfd holds a block (``EBUSY``).
        :raises DirtyTrackingError: no permission, the kernel lacks a feature (``EINVAL``), or
            anything else it refuses. All is undone then.
        """
        self._start_logs()
        try:
            holes = self._open()
            for log in self._logs.values():
                register_block(self._uffd, log.block)
            self._start_handler(fill_holes=not holes)
            for index in range(len(self._ranges)):
                _check(lib.wpsync_protect(self._native, index), "write-protecting guest RAM")
        except BaseException:
            self.stop()
            raise

    def sync(self, into: dict[str, Bitmap]) -> int:
        """See :class:`~guestmem.dirty.DirtyTracker`. The GIL is released meanwhile.

        :raises DirtyTrackingError: a page could not be protected again, or the handler ended.
        """
        fresh = 0
        for log, bitmap in self._bitmaps_for(into):
            self._collect(log)
            fresh += log.hand_over(bitmap)
        return fresh

    def stop(self) -> None:
        """End the handler, which takes all protection away first, and close. Harmless when not
        started."""
        if self._thread is not None:
            os.write(self._stop_fd, (1).to_bytes(8, "little"))
            self._thread.join()
            self._thread = None
        if self._native is not None:
            lib.wpsync_deinit(self._native)
            self._native = None
        for fd in (self._uffd, self._stop_fd):
            if fd >= 0:
                os.close(fd)
        self._uffd = self._stop_fd = -1
        self._stop_logs()

    @property
    def fault_count(self) -> int:
        """First writes seen since the start."""
        return int(lib.wpsync_faults(self._native)) if self._native is not None else 0

    def _open(self) -> bool:
        """Open the context; whether it protects holes of anonymous memory."""
        try:
            reported = kernel_support().features
            self._uffd, self.opening = open_fd(
                user_mode_only=self._user_mode_only,
                nonblocking=True,
                ways=(Way.DEVICE, Way.SYSCALL),
            )
            wanted = Feature.PAGEFAULT_FLAG_WP
            if any(log.block.is_shared for log in self._logs.values()):
                wanted |= Feature.WP_HUGETLBFS_SHMEM
            holes = self._may_protect_holes and Feature.WP_UNPOPULATED in reported
            if holes:
                wanted |= Feature.WP_UNPOPULATED
            if missing := wanted & ~reported:
                what = f"this kernel's userfaultfd lacks {missing!r} (Linux 5.19 has it)"
                raise DirtyTrackingError(errno.EINVAL, what)
            handshake(self._uffd, wanted)
        except UffdError as error:
            raise DirtyTrackingError(error.errno or errno.EINVAL, f"userfaultfd: {error}") from None
        return holes

    def _start_handler(self, *, fill_holes: bool) -> None:
        logs = list(self._logs.values())
        self._ranges = ffi.new("struct wpsync_range[]", sum(len(lg.block.mappings) for lg in logs))
        index = 0
        for log in logs:
            written = Bitmap(log.found.nbits)
            self._written[log.block.idstr] = written
            self._parts[log.block.idstr] = (index, len(log.block.mappings))
            for mapping in log.block.mappings:
                native = self._ranges[index]
                native.start, native.length = mapping.host, log.block.placed_length
                native.page_size = log.block.page_size
                native.written = ffi.cast("uint64_t *", written.address)
                native.nbits = written.nbits
                native.populate = fill_holes and not log.block.is_shared
                index += 1
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        native_tracker: Any = ffi.new("struct wpsync *")
        result = lib.wpsync_init(
            native_tracker, self._uffd, self._stop_fd, self._ranges, index, TARGET_PAGE_BITS
        )
        _check(result, "starting the write-protection handler")
        self._native = native_tracker
        self._thread = NamedThread(
            target=lib.wpsync_run, args=(native_tracker,), name="dirty-wp-sync", daemon=True
        )
        self._thread.start()
        # It still has to get the GIL once; whoever holds that may write to what we protect next.
        lib.wpsync_await_run(native_tracker)

    def _collect(self, log: BlockWriteLog) -> None:
        first, count = self._parts[log.block.idstr]
        result = lib.wpsync_take(
            self._native,
            first,
            count,
            ffi.cast("uint64_t *", log.noted.address),
            ffi.cast("uint64_t *", log.found.address),
        )
        _check(result, f"write-protecting {log.block!r} again")


def _check(result: int, what: str) -> int:
    if result < 0:
        raise DirtyTrackingError(-result, what)
    return result
