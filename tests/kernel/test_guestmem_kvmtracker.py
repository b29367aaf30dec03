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
    KvmRingTracker,
    KvmSlot,
    RAMBlock,
    RAMList,
    TrackerKind,
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


def test_writes_by_the_vmm_are_ored_in(guest: KvmGuest) -> None:
    """KVM sees vCPUs only. Accessors and discards note themselves, everything else must be told."""
    with RAMBlock.allocate("ram", PAGES * BASE) as block:
        tracker = KvmLogTracker(RAMList([block]), guest.vm_fd, [show(guest, block)])
        check_vmm_writes(tracker, block)


def check_vmm_writes(tracker: DirtyTracker, block: RAMBlock) -> None:
    """Each way the VMM itself changes guest RAM, seen and not seen."""
    tracker.start()
    into = {"ram": Bitmap(block.page_count)}
    view = block.unsafe_view()
    view[3 * BASE] = 1
    view.release()
    assert tracker.sync(into) == 0  # a raw view's writes: nobody knows
    tracker.note_written("ram", 3 * BASE, 10)
    block.discard(8 * BASE, 2 * BASE)
    block.write(20 * BASE - 1, b"over a border")
    block.fill(30 * BASE, 1, 7)
    block.move(40 * BASE, 20 * BASE, 8)
    block.store_u64(50 * BASE, 1)
    block.fetch_add_u64(60 * BASE, 1)
    block.read(70 * BASE, 8)
    assert tracker.sync(into) == 9
    expected = [(3, 1), (8, 2), (19, 2), (30, 1), (40, 1), (50, 1), (60, 1)]
    assert list(into["ram"].runs()) == expected
    tracker.stop()
    block.write(0, b"nobody tracks any more")
    assert tracker.kind in (TrackerKind.KVM_LOG, TrackerKind.KVM_RING)


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


# -- the dirty ring -----------------------------------------------------------------------------

RING_ENTRIES = 1024


@pytest.fixture
def ring_guest() -> Iterator[KvmGuest]:
    with kvm_guest(RING_ENTRIES) as guest:
        yield guest


def ring_tracker(guest: KvmGuest, block: RAMBlock, *slots: KvmSlot) -> KvmRingTracker:
    return KvmRingTracker(RAMList([block]), guest.rings, guest.vm_fd, slots)


@pytest.mark.parametrize("offset", [0, 3 * BASE])
def test_the_ring_names_what_the_vcpu_stored_to(ring_guest: KvmGuest, offset: int) -> None:
    """As with the log: only what was written since the last sync, page by page."""
    with RAMBlock.allocate("ram", PAGES * BASE) as block:
        block.fill(0, block.used_length, 1)
        tracker = ring_tracker(ring_guest, block, show(ring_guest, block, offset=offset))
        assert isinstance(tracker, DirtyTracker)
        ring_guest.store(GUEST_ADDRESS + 5 * BASE, 1)  # before the start: not reported
        tracker.start()
        into = {"ram": Bitmap(block.page_count)}
        assert tracker.sync(into) == 0
        for round_ in range(3):
            for page in (5, 64, 65, 130, PAGES - 1):
                ring_guest.store(GUEST_ADDRESS + page * BASE + 7, 0x40 + round_)
                assert block.read(page * BASE + 7, 1)[0] == 0x40 + round_
            assert tracker.sync(into) == 5
            assert list(into["ram"].runs()) == [(5, 1), (64, 2), (130, 1), (PAGES - 1, 1)]
            assert tracker.sync(into) == 0
            into["ram"].clear_all()
        tracker.stop()
        tracker.stop()
        ring_guest.store(GUEST_ADDRESS + 9 * BASE, 1)
        tracker.start()  # and anew: what came in between is not reported
        assert tracker.sync(into) == 0
        tracker.stop()


def test_the_vmms_writes_are_ored_into_the_ring_too(ring_guest: KvmGuest) -> None:
    with RAMBlock.allocate("ram", PAGES * BASE) as block:
        check_vmm_writes(ring_tracker(ring_guest, block, show(ring_guest, block)), block)


def test_a_full_ring_lets_the_vcpu_out_and_loses_nothing(ring_guest: KvmGuest) -> None:
    """More pages than the ring has entries, between two syncs."""
    with RAMBlock.allocate("ram", 2 * RING_ENTRIES * BASE) as block:
        block.fill(0, block.used_length, 1)
        tracker = ring_tracker(ring_guest, block, show(ring_guest, block))
        tracker.start()
        for page in range(block.page_count):
            ring_guest.store(GUEST_ADDRESS + page * BASE, 0x55)
        assert ring_guest.ring_full_exits == tracker.full_exits > 0
        into = {"ram": Bitmap(block.page_count)}
        assert tracker.sync(into) == block.page_count
        tracker.stop()


def test_log_and_ring_exclude_each_other(guest: KvmGuest, ring_guest: KvmGuest) -> None:
    """KVM's rule; both directions end in an error that says what to do."""
    with RAMBlock.allocate("ram", PAGES * BASE) as block:
        log = KvmLogTracker(RAMList([block]), ring_guest.vm_fd, [show(ring_guest, block)])
        log.start()  # switching slots on is allowed; reading a log that is not there is not
        with pytest.raises(DirtyTrackingError, match="dirty ring"):
            log.sync({"ram": Bitmap(block.page_count)})
        log.stop()
        with pytest.raises(DirtyTrackingError, match="no dirty ring") as caught:
            ring_tracker(guest, block, show(guest, block))
        assert "dirty-ring-size" in str(caught.value)
