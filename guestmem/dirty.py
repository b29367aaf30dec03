"""Which target pages the guest wrote: the common part of the dirty trackers.

The order that loses no write: :meth:`DirtyTracker.sync` finds the written pages **and protects
them again**, then the caller reads them. A write after the protection shows in the next sync,
whatever the caller read. The last sync comes when no vCPU runs.
"""

import errno
from abc import ABC, abstractmethod
from enum import StrEnum
from typing import Protocol, runtime_checkable

from guestmem.bitmap import Bitmap
from guestmem.errors import DirtyTrackingError
from guestmem.geometry import target_pages_per, touched_pages
from guestmem.ramblock import RAMBlock
from guestmem.ramlist import RAMList


class TrackerKind(StrEnum):
    """Who finds out what was written; the names are the user's."""

    WP_ASYNC = "wp-async"
    WP_SYNC = "wp-sync"
    KVM_LOG = "kvm-log"
    KVM_RING = "kvm-ring"
    NONE = "none"
    """Nobody writes, so nobody needs to find out."""


@runtime_checkable
class DirtyTracker(Protocol):
    """Finds what was written. One thread at a time, except :meth:`note_written`: any thread."""

    @property
    def kind(self) -> TrackerKind:
        """How it does it."""

    def start(self) -> None:
        """From here on writes are seen; the first sync reports writes since now."""

    def sync(self, into: dict[str, Bitmap]) -> int:
        """Set the bits of pages written since the last sync in ``into[idstr]``.

        :param into: for every block a bitmap of ``page_count`` bits. Only set, never cleared.
        :returns: how many target pages are newly set. Written huge pages are set whole.
        :raises DirtyTrackingError: not started, or the kernel refused. Nothing found is lost: it
            is in ``into`` or comes with the next sync.
        """

    def note_written(self, idstr: str, offset: int, length: int) -> None:
        """Tell of a write the tracker may not see; **after** the write, so that a sync in
        between cannot take the note and have the old bytes read."""

    def stop(self) -> None:
        """Stop and release what the kernel holds. Harmless when not started."""


class BlockWriteLog:
    """One block's part of a tracker: what the kernel found and what was noted, until taken.

    :ivar found: scratch for the kernel's findings, a bit per target page; what an error kept
        from being handed out stays in it for the next sync.
    :ivar noted: what it was told of; set atomically, by any thread.
    """

    __slots__ = ("block", "found", "noted")

    def __init__(self, block: RAMBlock) -> None:
        self.block = block
        self.found = Bitmap(block.page_count)
        self.noted = Bitmap(block.page_count)

    def note(self, offset: int, length: int) -> None:
        """Any thread. :raises ValueError: outside the block."""
        first, count = touched_pages(offset, length)
        if offset < 0 or offset + length > self.block.placed_length:
            raise ValueError(f"{self.block!r} has no [{offset:#x}, {offset + length:#x})")
        # The last huge page may reach past the part of the block in use.
        self.noted.set_atomic(first, max(0, min(count, self.noted.nbits - first)))

    def hand_over(self, into: Bitmap) -> int:
        """Move findings and notes into ``into``, as whole host pages; how many bits are new."""
        self.found.take(self.noted)
        self.found.widen(target_pages_per(self.block.page_size))
        return into.take(self.found)


class BlockTracker(ABC):
    """Base of the trackers: the per-block logs and the rules that all share.

    :cvar sees_own_writes: finds what our own accessors write without being told.
    """

    kind: TrackerKind = TrackerKind.NONE
    sees_own_writes = True

    def __init__(self, ram: RAMList) -> None:
        self._ram = ram
        self._logs: dict[str, BlockWriteLog] = {}

    @abstractmethod
    def start(self) -> None:
        """See :class:`DirtyTracker`."""

    @abstractmethod
    def sync(self, into: dict[str, Bitmap]) -> int:
        """See :class:`DirtyTracker`."""

    @abstractmethod
    def stop(self) -> None:
        """See :class:`DirtyTracker`."""

    @property
    def is_started(self) -> bool:
        """Between a successful start and stop?"""
        return bool(self._logs)

    def note_written(self, idstr: str, offset: int, length: int) -> None:
        """See :class:`DirtyTracker`. Ignored when not started: the first pass sends all.

        :raises KeyError: no such block. :raises ValueError: outside the block.
        """
        if self._logs:
            self._logs[idstr].note(offset, length)

    def _start_logs(self) -> None:
        if self._logs:
            raise DirtyTrackingError(errno.EALREADY, "dirty tracking is already started")
        self._logs = {block.idstr: BlockWriteLog(block) for block in self._ram}
        # A hole punched in shared memory changes contents, and no tracker sees it: write
        # protection survives it as a marker, and KVM logs vCPUs only.
        for log in self._logs.values():
            log.block.watch_discards(log.note)
            if not self.sees_own_writes:
                log.block.watch_writes(log.note)

    def _stop_logs(self) -> None:
        for log in self._logs.values():
            log.block.unwatch_discards(log.note)
            if not self.sees_own_writes:
                log.block.unwatch_writes(log.note)
        self._logs = {}

    def _bitmaps_for(self, into: dict[str, Bitmap]) -> list[tuple[BlockWriteLog, Bitmap]]:
        """Pair logs and bitmaps before anything is asked of the kernel."""
        if not self._logs:
            raise DirtyTrackingError(errno.EINVAL, "dirty tracking is not started")
        pairs = [(log, into[idstr]) for idstr, log in self._logs.items()]
        for log, bitmap in pairs:
            if bitmap.nbits != log.found.nbits:
                raise ValueError(f"{bitmap!r} for {log.block!r} of {log.found.nbits} pages")
        return pairs
