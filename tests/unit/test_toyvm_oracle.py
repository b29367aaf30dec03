"""The oracle can fail: every kind of damage to guest RAM is found, and named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestmem import TARGET_PAGE_BYTES as PAGE
from guestmem import RAMBlock
from migration.toyvm import Damage, ToyMachine, ToyOptions, Workload
from tests.support.toyvm_machines import flip, run_some

OPTIONS = ToyOptions(
    ram_bytes=4 << 20,
    extra_blocks=(("toy.extra", 1 << 20),),
    smp=2,
    fill_share=0.75,
    write_share=1.0,
    workload=Workload.RANDOM,
)


@pytest.fixture(scope="module")
def used() -> Iterator[ToyMachine]:
    """A machine whose pages have been written; every test puts back what it damages."""
    with ToyMachine(OPTIONS) as machine:
        run_some(machine, 20_000)
        yield machine


@pytest.fixture
def block(used: ToyMachine) -> RAMBlock:
    return used.ram.by_idstr("toy.ram")


class _Undo:
    """Puts a page back."""

    def __init__(self, block: RAMBlock, page: int) -> None:
        self.block, self.page = block, page
        self.data = block.read(page * PAGE, PAGE)

    def __enter__(self) -> bytes:
        return self.data

    def __exit__(self, *_: object) -> None:
        self.block.write(self.page * PAGE, self.data)


def _only(machine: ToyMachine, block: RAMBlock, page: int) -> Damage:
    report = machine.sweep()
    assert report.errors == 1, report
    assert (report.bad[0].block, report.bad[0].page) == (block.idstr, page)
    return report.bad[0].damage


def test_whole_ram_is_checked_and_clean(used: ToyMachine) -> None:
    report = used.sweep()
    assert report.is_clean, report.bad
    assert report.pages_checked == sum(block.page_count for block in used.ram)


@given(offset=st.integers(0, PAGE - 1))
def test_a_flipped_bit_anywhere_in_a_page_is_found(offset: int) -> None:
    with ToyMachine(ToyOptions(ram_bytes=1 << 20, ring_pages=0)) as machine:
        flip(machine.ram.by_idstr("toy.ram"), 7 * PAGE + offset)
        report = machine.sweep()
        assert [bad.page for bad in report.bad] == [7]


def test_a_flipped_bit_in_any_page_is_found(used: ToyMachine) -> None:
    for block in used.ram:
        for page in range(0, block.page_count, 37):
            with _Undo(block, page):
                flip(block, page * PAGE + 4001)
                _only(used, block, page)


def test_a_zeroed_page_is_found(used: ToyMachine, block: RAMBlock) -> None:
    with _Undo(block, 5):
        block.fill(5 * PAGE, PAGE, 0)
        assert _only(used, block, 5) is Damage.ZEROED


def test_two_swapped_pages_are_found(used: ToyMachine, block: RAMBlock) -> None:
    with _Undo(block, 8) as first, _Undo(block, 9) as second:
        block.write(8 * PAGE, second)
        block.write(9 * PAGE, first)
        report = used.sweep()
        assert [(bad.page, bad.damage) for bad in report.bad] == [
            (8, Damage.MISPLACED),
            (9, Damage.MISPLACED),
        ]


def test_the_same_page_of_another_block_is_found(used: ToyMachine, block: RAMBlock) -> None:
    other = used.ram.by_idstr("toy.extra")
    with _Undo(block, 3), _Undo(other, 3) as foreign:
        block.write(3 * PAGE, foreign)
        assert _only(used, block, 3) is Damage.MISPLACED


def test_a_stale_page_replayed_whole_is_found(used: ToyMachine, block: RAMBlock) -> None:
    with ToyMachine(OPTIONS) as fresh:
        old = fresh.ram.by_idstr("toy.ram").read(2 * PAGE, PAGE)
    with _Undo(block, 2) as current:
        assert current != old, "the workload did not write this page"
        block.write(2 * PAGE, old)
        assert _only(used, block, 2) is Damage.STALE


def test_a_torn_page_is_found(used: ToyMachine, block: RAMBlock) -> None:
    with ToyMachine(OPTIONS) as fresh:
        old = fresh.ram.by_idstr("toy.ram").read(2 * PAGE, PAGE)
    with _Undo(block, 2) as current:
        block.write(2 * PAGE, current[: PAGE // 2] + old[PAGE // 2 :])
        assert _only(used, block, 2) is Damage.TORN


def test_a_page_newer_than_the_log_is_found(used: ToyMachine, block: RAMBlock) -> None:
    log = used.aux.log(0)
    kept = bytes(log[0:4])
    try:
        log[0:4] = bytes(4)
        assert _only(used, block, 0) is Damage.FUTURE
    finally:
        log[0:4] = kept


def test_garbage_in_an_unfilled_page_is_found(used: ToyMachine, block: RAMBlock) -> None:
    page = int(used.aux.layout.filled[0]) + 3
    with _Undo(block, page):
        block.write(page * PAGE + 100, b"x")
        assert _only(used, block, page) is Damage.NOT_ZERO


def test_a_wrong_ring_descriptor_is_found(used: ToyMachine) -> None:
    last = used.ram.by_idstr("toy.extra")
    page = last.page_count - 1
    with _Undo(last, page):
        flip(last, page * PAGE + 8)
        assert _only(used, last, page) is Damage.RING


def test_a_ring_rolled_back_whole_is_found(used: ToyMachine) -> None:
    ring = used.devices.ring
    assert ring is not None
    run_some(used, 10)
    head = ring.head
    ring.head = head + 1
    try:
        assert used.sweep().errors == 1
        with pytest.raises(ValueError, match="does not fit head"):
            ring.verify_through_ram()
    finally:
        ring.head = head


def test_a_vcpu_finds_damage_at_its_next_touch() -> None:
    options = ToyOptions(ram_bytes=1 << 20, ring_pages=0, workload=Workload.SEQUENTIAL)
    with ToyMachine(options) as machine:
        flip(machine.ram.by_idstr("toy.ram"), 11 * PAGE)
        run_some(machine, 256)
        statistics = machine.vcpu_statistics()[0]
        assert statistics.errors >= 1
        assert machine.aux.state(0).bad[0].page == 11
        # A damaged page is left alone, so that the sweep finds it too.
        assert [bad.page for bad in machine.sweep().bad] == [11]


def test_a_sweep_of_a_running_guest_is_refused(used: ToyMachine) -> None:
    used.start()
    try:
        with pytest.raises(RuntimeError, match="stop it"):
            used.sweep()
    finally:
        used.stop()
