"""Who finds out what the guest wrote: the choice, by what this host can do, and, where the kernel
sees only what vCPUs write, the devices' own writes."""

from __future__ import annotations

from collections.abc import Mapping

from guestmem import (
    Bitmap,
    DirtyTracker,
    KvmLogTracker,
    KvmRingTracker,
    RAMList,
    TrackerKind,
    WpAsyncTracker,
    WpSyncTracker,
)
from guestmem.dirty import BlockTracker

from .kvm import KvmMachine
from .options import OptionError, TrackerChoice


def choose_tracker(choice: TrackerChoice, ram: RAMList, kvm: KvmMachine | None) -> BlockTracker:
    """A tracker, not started.

    ``AUTO``: for KVM vCPUs the dirty ring if the VM has one, else the dirty log; for thread vCPUs
    asynchronous write protection if a try on a scrap of memory works here, else the synchronous
    kind.

    :raises OptionError: a tracker that cannot see these vCPUs.
    """
    if choice is TrackerChoice.AUTO:
        choice = _best(kvm)
    match choice:
        case TrackerChoice.WP_ASYNC:
            return WpAsyncTracker(ram)
        case TrackerChoice.WP_SYNC:
            return WpSyncTracker(ram, user_mode_only=None if kvm is None else False)
    if kvm is None:
        raise OptionError(f"tracker {choice.value} sees KVM vCPUs only")
    if choice is TrackerChoice.KVM_RING:
        return KvmRingTracker(ram, kvm.rings, kvm.fd, kvm.slots)
    return KvmLogTracker(ram, kvm.fd, kvm.slots)


def _best(kvm: KvmMachine | None) -> TrackerChoice:
    if kvm is not None:
        return TrackerChoice.KVM_RING if kvm.rings else TrackerChoice.KVM_LOG
    return TrackerChoice.WP_ASYNC if WpAsyncTracker.works_here() else TrackerChoice.WP_SYNC


class VmmAwareTracker:
    """A tracker plus bitmaps in which native device threads note pages they wrote, atomically and
    after the write. One thread at a time, like every tracker."""

    def __init__(self, inner: DirtyTracker, written: Mapping[str, Bitmap]) -> None:
        """:param written: by idstr, a bit per target page; emptied by each sync."""
        self._inner = inner
        self._written = written

    @property
    def kind(self) -> TrackerKind:
        """The kind of the tracker inside."""
        return self._inner.kind

    def start(self) -> None:
        """See :class:`guestmem.DirtyTracker`. Earlier notes are forgotten: the first pass sends
        everything anyway."""
        self._inner.start()
        for bitmap in self._written.values():
            Bitmap(bitmap.nbits).take(bitmap)

    def sync(self, into: dict[str, Bitmap]) -> int:
        """See :class:`guestmem.DirtyTracker`."""
        fresh = self._inner.sync(into)
        return fresh + sum(into[idstr].take(noted) for idstr, noted in self._written.items())

    def note_written(self, idstr: str, offset: int, length: int) -> None:
        """See :class:`guestmem.DirtyTracker`."""
        self._inner.note_written(idstr, offset, length)

    def stop(self) -> None:
        """See :class:`guestmem.DirtyTracker`."""
        self._inner.stop()
