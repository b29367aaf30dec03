"""Memory slots of a KVM machine, and switching their dirty logging on and off."""

from dataclasses import dataclass
from typing import Any

from guestmem._native import ffi, lib
from guestmem.errors import DirtyTrackingError
from guestmem.geometry import TARGET_PAGE_BYTES, is_aligned
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


class SlotLogging:
    """Which slots log, so that they can be switched off again."""

    def __init__(self, ram: RAMList, vm_fd: int) -> None:
        """:param vm_fd: the VM, borrowed."""
        self._ram = ram
        self._vm_fd = vm_fd
        self._on: list[KvmSlot] = []

    def switch_on(self, slot: KvmSlot) -> None:
        """:raises DirtyTrackingError: KVM refused."""
        self._set(slot, enabled=True)
        self._on.append(slot)

    def switch_all_off(self) -> None:
        """Every slot that was switched on. :raises DirtyTrackingError: KVM refused."""
        while self._on:
            self._set(self._on.pop(), enabled=False)

    def _set(self, slot: KvmSlot, *, enabled: bool) -> None:
        native: Any = ffi.new("struct kvmlog_slot *")
        native.slot = slot.slot
        native.flags = slot.flags
        native.guest_address = slot.guest_address
        native.length = slot.length
        native.host = self._ram.by_idstr(slot.idstr).host + slot.offset
        result = lib.kvmlog_set_logging(self._vm_fd, native, enabled)
        if result < 0:
            what = "on" if enabled else "off"
            raise DirtyTrackingError(-result, f"switching dirty logging of slot {slot.slot} {what}")


def check_slot(slot: KvmSlot, ram: RAMList) -> None:
    """:raises KeyError: it names no block. :raises ValueError: it leaves its block."""
    block = ram.by_idstr(slot.idstr)
    whole = is_aligned(slot.offset | slot.length, TARGET_PAGE_BYTES)
    if not whole or slot.offset < 0 or slot.length <= 0:
        raise ValueError(f"{slot} is not made of whole target pages")
    if slot.offset + slot.length > block.used_length:
        raise ValueError(f"{slot} leaves {block!r}")
