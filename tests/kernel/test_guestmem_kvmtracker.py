"""Dirty tracking by KVM's log, with a vCPU that really writes."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from guestmem import (
    TARGET_PAGE_BYTES,
    Bitmap,
    DirtyTracker,
    DirtyTrackingError,
    KvmLogTracker,
    KvmSlot,
    RAMBlock,
    RAMList,
    WpAsyncTracker,
)
from tests.support.guestmem_kvm import RAM_SLOT, KvmGuest, kvm_guest
from tests.support.guestmem_memory import BASE, kind_of_memory

pytestmark = pytest.mark.kernel

GUEST_ADDRESS = 64 << 20
PAGES = 200


@pytest.fixture
def guest() -> Iterator[KvmGuest]:
    with kvm_guest() as guest:
        yield guest


def show(guest: KvmGuest, block: RAMBlock, *, offset: int = 0, number: int = RAM_SLOT) -> KvmSlot:
    """Show the block from ``offset`` on to the guest."""
    length = block.used_length - offset
    slot = KvmSlot(number, block.idstr, offset, length, GUEST_ADDRESS + offset)
    guest.add_slot(slot, block)
    return slot


@pytest.mark.parametrize("offset", [0, 3 * BASE])
def test_stores_by_the_vcpu_are_reported(guest: KvmGuest, offset: int) -> None:
    """Pages in the first word of the log, in the middle and at the end, slot at an odd offset."""
    with RAMBlock.allocate("ram", PAGES * BASE) as block:
        ram = RAMList([block])
        block.fill(0, block.used_length, 1)
        tracker = KvmLogTracker(ram, guest.vm_fd, [show(guest, block, offset=offset)])
        assert isinstance(tracker, DirtyTracker)
        guest.store(GUEST_ADDRESS + 5 * BASE, 1)  # before the start: not reported
        tracker.start()
        into = {"ram": Bitmap(block.page_count)}
        assert tracker.sync(into) == 0
        for round_ in range(3):
            for page in (5, 64, 65, 130, PAGES - 1):
                guest.store(GUEST_ADDRESS + page * BASE + 7, 0x40 + round_)
                assert block.read(page * BASE + 7, 1)[0] == 0x40 + round_
            assert tracker.sync(into) == 5
            assert list(into["ram"].runs()) == [(5, 1), (64, 2), (130, 1), (PAGES - 1, 1)]
            assert tracker.sync(into) == 0
            into["ram"].clear_all()
        tracker.stop()
        tracker.stop()
        guest.store(GUEST_ADDRESS + 9 * BASE, 1)
        tracker.start()  # and anew: what came in between is not reported
        assert tracker.sync(into) == 0
        tracker.stop()


def test_writes_by_the_vmm_need_a_note(guest: KvmGuest) -> None:
    """KVM logs vCPUs only: that is why notes and discards are or-ed in."""
    with RAMBlock.allocate("ram", PAGES * BASE) as block:
        tracker = KvmLogTracker(RAMList([block]), guest.vm_fd, [show(guest, block)])
        tracker.start()
        into = {"ram": Bitmap(block.page_count)}
        block.write(3 * BASE, b"by the VMM")
        assert tracker.sync(into) == 0
        tracker.note_written("ram", 3 * BASE, 10)
        block.discard(8 * BASE, 2 * BASE)
        assert tracker.sync(into) == 3
        assert list(into["ram"].runs()) == [(3, 1), (8, 2)]
        tracker.stop()


def test_huge_pages_are_reported_whole(guest: KvmGuest, tmp_path: Path) -> None:
    with kind_of_memory("hugetlb", tmp_path, hugepages=2) as kind, kind.block(pages=2) as block:
        tracker = KvmLogTracker(RAMList([block]), guest.vm_fd, [show(guest, block)])
        tracker.start()
        into = {"ram": Bitmap(block.page_count)}
        guest.store(GUEST_ADDRESS + kind.page_size + 5 * BASE, 1)
        per_page = kind.page_size // TARGET_PAGE_BYTES
        assert tracker.sync(into) == per_page
        assert list(into["ram"].runs()) == [(per_page, per_page)]
        tracker.stop()


@pytest.mark.parametrize("name", ["anon", "memfd", "hugetlb"])
def test_write_protection_sees_the_vcpu_too(guest: KvmGuest, name: str, tmp_path: Path) -> None:
    """The other tracker works for KVM guests: their faults go through our page tables."""
    with kind_of_memory(name, tmp_path) as kind, kind.block(pages=4) as block:
        show(guest, block)
        block.fill(0, block.used_length, 1)
        tracker = WpAsyncTracker(RAMList([block]))
        tracker.start()
        into = {"ram": Bitmap(block.page_count)}
        for _ in range(2):
            guest.store(GUEST_ADDRESS + 2 * kind.page_size + 5, 0x77)
            per_page = kind.page_size // TARGET_PAGE_BYTES
            assert tracker.sync(into) == per_page
            assert into["ram"].next_run() == (2 * per_page, per_page)
            into["ram"].clear_all()
        tracker.stop()


def test_slots_that_do_not_fit_are_refused() -> None:
    with RAMBlock.allocate("ram", 4 * BASE) as block:
        ram = RAMList([block])
        good = KvmSlot(0, "ram", 0, 4 * BASE, 0)
        KvmLogTracker(ram, -1, [good])
        for change in (
            {"offset": 1},
            {"offset": BASE},
            {"offset": -BASE},
            {"length": 0},
            {"length": 5 * BASE},
        ):
            with pytest.raises(ValueError, match="KvmSlot"):
                KvmLogTracker(ram, -1, [replace(good, **change)])  # type: ignore[arg-type]
        with pytest.raises(KeyError):
            KvmLogTracker(ram, -1, [replace(good, idstr="other")])


def test_what_kvm_refuses_is_a_clear_error(guest: KvmGuest) -> None:
    with RAMBlock.allocate("ram", 4 * BASE) as block:
        ram = RAMList([block])
        slot = show(guest, block)
        tracker = KvmLogTracker(ram, guest.vm_fd, [slot, replace(slot, slot=60_000)])
        with pytest.raises(DirtyTrackingError, match="slot 60000"):
            tracker.start()
        with pytest.raises(DirtyTrackingError, match="not started"):
            tracker.sync({"ram": Bitmap(4)})
        with open(os.devnull, "rb") as other:
            tracker = KvmLogTracker(ram, other.fileno(), [slot])
            with pytest.raises(DirtyTrackingError) as caught:
                tracker.start()
        assert caught.value.errno in (errno.ENOTTY, errno.EBADF)
