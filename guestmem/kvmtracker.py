"""Dirty tracking by KVM's dirty log: what vCPUs write, slot by slot."""

import errno
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from guestmem._native import ffi, lib
from guestmem.bitmap import Bitmap
from guestmem.dirty import BlockTracker, BlockWriteLog
from guestmem.errors import DirtyTrackingError
from guestmem.geometry import TARGET_PAGE_BITS, TARGET_PAGE_BYTES, is_aligned, target_pages
from guestmem.ramlist import RAMList


@dataclass(frozen=True)
class KvmSlot:
    """A memory slot of a VM, as it was set up, so that logging can be switched on in place.

    :ivar slot: address space << 16 | number.
    :ivar idstr: the block it shows; ``offset`` and ``length`` in bytes, whole target pages.
    :ivar guest_address: physical address in the guest.
    :ivar flags: ``KVM_MEM_*`` of the slot, without the logging flag.
    """

    slot: int
    idstr: str
    offset: int
    length: int
    guest_address: int
    flags: int = 0


class KvmLogTracker(BlockTracker):
    """Sees what the VM's vCPUs write, and nothing else.

    Writes by the VMM itself (device emulation, accessors, ``read(2)`` into guest RAM) and by
    UFFDIO_COPY are **not** in KVM's log: each needs :meth:`note_written`.

    Uses two-step clearing (KVM_CLEAR_DIRTY_LOG) where the kernel has it, so that only pages found
    dirty are protected again; that mode then stays on for the VM. A block may be shown by several
    slots. Does not work together with KVM's dirty ring (``ENXIO`` from the kernel).

    Source: kernel ``Documentation/virt/kvm/api.rst``, 4.8, 4.35 and 4.117.
    """

    def __init__(self, ram: RAMList, vm_fd: int, slots: Sequence[KvmSlot]) -> None:
        """:param vm_fd: the VM, borrowed. :param slots: every slot that shows a block of ``ram``.

        :raises KeyError: a slot names no block. :raises ValueError: a slot leaves its block.
        """
        super().__init__(ram)
        self._vm_fd = vm_fd
        self._slots = tuple(slots)
        self._logging: list[KvmSlot] = []
        self._manual = False
        self._scratch = Bitmap(0)
        for slot in self._slots:
            _check_slot(slot, ram)

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
                self._set_logging(slot, enabled=True)
                self._logging.append(slot)
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
        while self._logging:
            self._set_logging(self._logging.pop(), enabled=False)

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

    def _set_logging(self, slot: KvmSlot, *, enabled: bool) -> None:
        native: Any = ffi.new("struct kvmlog_slot *")
        native.slot = slot.slot
        native.flags = slot.flags
        native.guest_address = slot.guest_address
        native.length = slot.length
        native.host = self._ram.by_idstr(slot.idstr).host + slot.offset
        what = "on" if enabled else "off"
        _check(
            lib.kvmlog_set_logging(self._vm_fd, native, enabled),
            f"switching dirty logging of slot {slot.slot} {what}",
        )


def _check_slot(slot: KvmSlot, ram: RAMList) -> None:
    block = ram.by_idstr(slot.idstr)
    whole = is_aligned(slot.offset | slot.length, TARGET_PAGE_BYTES)
    if not whole or slot.offset < 0 or slot.length <= 0:
        raise ValueError(f"{slot} is not made of whole target pages")
    if slot.offset + slot.length > block.used_length:
        raise ValueError(f"{slot} leaves {block!r}")


def _check(result: int, what: str) -> int:
    if result == -errno.ENXIO:
        what += " (is the VM using a dirty ring?)"
    if result < 0:
        raise DirtyTrackingError(-result, what)
    return result
