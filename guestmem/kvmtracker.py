"""Dirty tracking by KVM's dirty log: what vCPUs write, slot by slot."""

import errno
from collections.abc import Sequence

from guestmem._native import ffi, lib
from guestmem.bitmap import Bitmap
from guestmem.dirty import BlockTracker, BlockWriteLog, TrackerKind
from guestmem.errors import DirtyTrackingError
from guestmem.geometry import TARGET_PAGE_BITS, target_pages
from guestmem.kvmslot import KvmSlot, SlotLogging, check_slot
from guestmem.ramlist import RAMList


class KvmLogTracker(BlockTracker):
    """Sees what the VM's vCPUs write, and nothing else.

    Writes by the VMM itself are **not** in KVM's log: accessors note themselves, everything else
    (native device emulation, raw views, ``read(2)`` into guest RAM, UFFDIO_COPY) needs
    :meth:`note_written`.

    Uses two-step clearing (KVM_CLEAR_DIRTY_LOG) where the kernel has it, so that only pages found
    dirty are protected again; that mode then stays on for the VM. A block may be shown by several
    slots. Does not work together with KVM's dirty ring (``ENXIO`` from the kernel).

    Source: kernel ``Documentation/virt/kvm/api.rst``, 4.8, 4.35 and 4.117.
    """

    kind = TrackerKind.KVM_LOG
    sees_own_writes = False

    def __init__(self, ram: RAMList, vm_fd: int, slots: Sequence[KvmSlot]) -> None:
        """:param vm_fd: the VM, borrowed. :param slots: every slot that shows a block of ``ram``.

        :raises KeyError: a slot names no block. :raises ValueError: a slot leaves its block.
        """
        super().__init__(ram)
        self._vm_fd = vm_fd
        self._slots = tuple(slots)
        self._logging = SlotLogging(ram, vm_fd)
        self._manual = False
        self._scratch = Bitmap(0)
        for slot in self._slots:
            check_slot(slot, ram)

    def start(self) -> None:
        """Switch logging on for every slot.

        :raises DirtyTrackingError: KVM refused. All is undone then.
        """
        self._start_logs()
        longest = max((slot.length for slot in self._slots), default=0)
        self._scratch = Bitmap(target_pages(longest))
        try:
            granted = lib.kvmlog_enable_manual_protect(self._vm_fd)
            self._manual = bool(_check(granted, "asking KVM for two-step dirty logging"))
            for slot in self._slots:
                self._logging.switch_on(slot)
        except BaseException:
            self.stop()
            raise

    def sync(self, into: dict[str, Bitmap]) -> int:
        """See :class:`~guestmem.dirty.DirtyTracker`.

        :raises DirtyTrackingError: with KVM's errno; pages already read come with the next sync.
        """
        pairs = self._bitmaps_for(into)
        for slot in self._slots:
            self._collect(slot, self._logs[slot.idstr])
        return sum(log.hand_over(bitmap) for log, bitmap in pairs)

    def stop(self) -> None:
        """Switch logging off. Harmless when not started."""
        self._stop_logs()
        self._logging.switch_all_off()

    def _collect(self, slot: KvmSlot, log: BlockWriteLog) -> None:
        result = lib.kvmlog_collect(
            self._vm_fd,
            slot.slot,
            self._manual,
            ffi.cast("uint64_t *", self._scratch.address),
            target_pages(slot.length),
            ffi.cast("uint64_t *", log.found.address),
            slot.offset >> TARGET_PAGE_BITS,
        )
        _check(result, f"reading the dirty log of slot {slot.slot}")


def _check(result: int, what: str) -> int:
    if result == -errno.ENXIO:
        what += " (is the VM using a dirty ring?)"
    if result < 0:
        raise DirtyTrackingError(-result, what)
    return result
