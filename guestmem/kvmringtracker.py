"""Dirty tracking by KVM's dirty rings: what vCPUs write, page by page, ring by ring."""

import errno
from collections.abc import Sequence
from typing import Any

from guestmem._native import ffi, lib
from guestmem.bitmap import Bitmap
from guestmem.dirty import BlockTracker, TrackerKind
from guestmem.errors import DirtyTrackingError
from guestmem.geometry import TARGET_PAGE_BITS, target_pages
from guestmem.kvmslot import KvmSlot, SlotLogging, check_slot
from guestmem.ramlist import RAMList


class KvmRingTracker(BlockTracker):
    """Sees what the VM's vCPUs write, and nothing else; a sync costs by what was written, not by
    how large the VM is.

    The rings exist since before the first vCPU; this object borrows them (``struct kvmring``). A
    vCPU whose ring is full leaves the guest and empties it natively, without the GIL; one lock
    makes that and :meth:`sync` safe at once. Writes by the VMM itself are not in a ring: accessors
    note themselves, everything else needs :meth:`note_written`.

    Source: kernel ``Documentation/virt/kvm/api.rst``, 8.29; Linux 5.11.
    """

    kind = TrackerKind.KVM_RING
    sees_own_writes = False

    def __init__(self, ram: RAMList, rings: int, vm_fd: int, slots: Sequence[KvmSlot]) -> None:
        """:param rings: address of the VM's ``struct kvmring``, borrowed; 0: it has none.
        :param vm_fd: the VM, borrowed. :param slots: every slot that shows a block of ``ram``.

        :raises DirtyTrackingError: the VM was made without rings.
        :raises KeyError: a slot names no block. :raises ValueError: a slot leaves its block.
        """
        super().__init__(ram)
        if not rings:
            raise DirtyTrackingError(
                errno.EOPNOTSUPP,
                "this VM has no dirty ring",
                remedy="start it with --accel kvm,dirty-ring-size=4096",
            )
        self._rings: Any = ffi.cast("struct kvmring *", rings)
        self._slots = tuple(slots)
        self._logging = SlotLogging(ram, vm_fd)
        self._maps: dict[str, Bitmap] = {}
        for slot in self._slots:
            check_slot(slot, ram)

    def start(self) -> None:
        """Switch logging on for every slot.

        :raises DirtyTrackingError: KVM refused. All is undone then.
        """
        self._start_logs()
        try:
            self._note_into_maps()
            for slot in self._slots:
                self._logging.switch_on(slot)
        except BaseException:
            self.stop()
            raise

    def sync(self, into: dict[str, Bitmap]) -> int:
        """See :class:`~guestmem.dirty.DirtyTracker`.

        :raises DirtyTrackingError: with KVM's errno; pages found already come with the next sync.
        """
        pairs = self._bitmaps_for(into)
        _check(lib.kvmring_collect(self._rings), "emptying KVM's dirty rings")
        fresh = 0
        for log, bitmap in pairs:
            lib.kvmring_take(
                self._rings,
                ffi.cast("uint64_t *", self._maps[log.block.idstr].address),
                log.found.nbits,
                ffi.cast("uint64_t *", log.found.address),
            )
            fresh += log.hand_over(bitmap)
        return fresh

    def stop(self) -> None:
        """Switch logging off and empty the rings. Harmless when not started."""
        self._stop_logs()
        self._logging.switch_all_off()
        if self._maps:
            lib.kvmring_set_ranges(self._rings, ffi.NULL, 0)
            self._maps = {}

    @property
    def full_exits(self) -> int:
        """How often a vCPU had to empty a full ring itself, in the life of the VM."""
        return int(lib.kvmring_full_exits(self._rings))

    def _note_into_maps(self) -> None:
        self._maps = {idstr: Bitmap(log.found.nbits) for idstr, log in self._logs.items()}
        ranges: Any = ffi.new("struct kvmring_range[]", len(self._slots))
        for native, slot in zip(ranges, self._slots, strict=True):
            native.slot = slot.slot
            native.npages = target_pages(slot.length)
            native.first_bit = slot.offset >> TARGET_PAGE_BITS
            native.map = ffi.cast("uint64_t *", self._maps[slot.idstr].address)
        result = lib.kvmring_set_ranges(self._rings, ranges, len(self._slots))
        _check(result, "emptying KVM's dirty rings")


def _check(result: int, what: str) -> None:
    if result < 0:
        raise DirtyTrackingError(-result, what)
