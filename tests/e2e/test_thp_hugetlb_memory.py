"""Huge pages at the destination: transparent ones out of the way while pages are placed one by one,
and a pool of fixed ones that runs dry."""

from __future__ import annotations

import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guestmem import Backing, MappingReport, RAMBlock
from guestmem._native import lib
from guestmem.pools import HugepagePool
from migration.native import ffi
from migration.runtime.errors import HugepagesExhausted, native_error
from tests.support.e2e_leaks import nothing_left
from tests.support.e2e_start import migrate_by_postcopy
from tests.support.guestmem_memory import HUGE, more_hugepages
from tests.support.need import need
from tests.support.pair import MIB, Side, pair

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

RAM_BYTES = 16 * MIB
PAGE = 4096
MADV_POPULATE_WRITE = 23  # Linux 5.14


def until(holds: Callable[[], bool], what: str) -> None:
    """For a figure that nobody announces."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.001)


def precopy_pages(side: Side) -> int:
    incoming = side.service.incoming.migration
    return int(str(incoming.ram.statistics()["precopy_pages"])) if incoming is not None else 0


def main_block(side: Side) -> RAMBlock:
    return side.machine.ram.by_idstr("toy.ram")


def report_of(side: Side) -> MappingReport:
    (found,) = main_block(side).reports()
    return found


def looks_at(side: Side, status: str) -> list[MappingReport]:
    """What smaps says at the moment that status is announced, by the thread that announces it."""
    seen: list[MappingReport] = []

    def look(name: str, data: dict[str, object]) -> None:
        if name == "MIGRATION" and data["status"] == status:
            seen.append(report_of(side))

    side.service.add_listener(look)
    return seen


def huge_regions_complete(side: Side) -> int:
    """How many 2 MiB regions have all their pages: only these may still be huge."""
    incoming = side.service.incoming.migration
    assert incoming is not None
    received = incoming.ram.received["toy.ram"]
    pages = HUGE // PAGE
    return sum(
        all(received.test(page) for page in range(first, first + pages))
        for first in range(0, RAM_BYTES // PAGE, pages)
    )


def test_transparent_huge_pages_are_broken_and_allowed_again(tmp_path: Path) -> None:
    """Formed in precopy, broken where a page was discarded, off up to the end, then on again."""
    options: dict[str, Any] = {"ram_bytes": RAM_BYTES, "smp": 0, "ring_pages": 0}
    with nothing_left(), pair(**options) as (source, target):
        block = main_block(target)
        block.set_thp(True)
        block.fill(0, HUGE, 1)
        need(
            report_of(target).anon_huge_pages,
            "no transparent huge pages form in anonymous memory",
            remedy="echo madvise > /sys/kernel/mm/transparent_hugepage/enabled",
        )
        complete: list[int] = []
        target.service.add_listener(
            lambda name, data: (
                complete.append(huge_regions_complete(target))
                if data.get("status") == "postcopy-active"
                else None
            )
        )
        listening = looks_at(target, "postcopy-active")
        source.service.set_parameters(
            {"max-bandwidth": 64 * MIB, "downtime-limit": 0, "x-hold-background": True}
        )
        source.machine.start()
        target.service.migrate_incoming(f"unix:{tmp_path}/m")
        source.service.migrate(f"unix:{tmp_path}/m")
        target.wait_status("active")
        until(lambda: precopy_pages(target) > 6 * MIB // PAGE, "precopy stands still")
        before = report_of(target).anon_huge_pages
        assert before >= 4 * MIB  # it is there to be broken
        for region in range(2):
            main_block(source).write(region * HUGE + 5 * PAGE, b"rewritten")
        source.service.start_postcopy()
        target.wait_event("RESUME")

        (at_listen,) = listening
        assert "nh" in at_listen.vm_flags
        assert "hg" not in at_listen.vm_flags
        assert at_listen.anon_huge_pages <= complete[0] * HUGE < before
        # A page that is missing is missing, not a piece of a huge page of zeros.
        assert block.read(5 * PAGE, 9) == b"rewritten"
        assert "nh" in report_of(target).vm_flags

        source.service.set_parameters({"x-hold-background": False})
        assert source.service.wait(30) == "completed", source.service.query()
        assert target.service.wait(30) == "completed"
        assert "hg" in report_of(target).vm_flags
        for page in range(RAM_BYTES // PAGE):
            assert block.read(page * PAGE, PAGE) == main_block(source).read(page * PAGE, PAGE)


@pytest.mark.parametrize("backing", [Backing.ANON, Backing.MEMFD])
def test_forbidden_on_every_mapping(backing: Backing, tmp_path: Path) -> None:
    """Also where a device maps the block a second time; no huge page while any page is missing."""
    with nothing_left(), pair(ram_bytes=RAM_BYTES, backing=backing) as (source, target):
        block = main_block(target)
        if backing is Backing.MEMFD:
            block.add_alias()
        seen: list[list[frozenset[str]]] = []

        def look(name: str, data: dict[str, object]) -> None:
            if data.get("status") in ("postcopy-active", "completed"):
                seen.append([report.vm_flags for report in block.reports()])

        target.service.add_listener(look)
        source.machine.start()
        target.service.migrate_incoming(f"unix:{tmp_path}/m")
        migrate_by_postcopy(source.service, f"unix:{tmp_path}/m")
        assert source.service.wait(30) == "completed", source.service.query()
        assert target.service.wait(30) == "completed"
        until(lambda: len(seen) == 2, "both states are announced, which may be a little later")
        during, after = seen
        assert len(during) == len(block.mappings)
        assert all("nh" in flags for flags in during)
        assert all("hg" in flags for flags in after)
        target.assert_sweep_clean()


def test_an_empty_pool_pauses_and_can_be_mended(tmp_path: Path) -> None:
    """Somebody took the huge pages promised to the guest: said with the remedy, and nothing is made
    up; then the remedy and a recovery, and the guest has all of its pages."""
    ram = 8 * MIB
    pages = ram // HUGE
    with (
        more_hugepages(2 * pages, tmp_path / "journal"),
        nothing_left(),
        pair(ram_bytes=ram, backing=Backing.HUGETLB, smp=0, ring_pages=0) as (source, target),
    ):
        source.service.set_parameters({"x-hold-background": True})
        source.machine.start()
        target.service.migrate_incoming(f"unix:{tmp_path}/m")
        migrate_by_postcopy(source.service, f"unix:{tmp_path}/m")
        target.wait_event("RESUME")
        thief = steal_reservation(target)
        try:
            source.service.set_parameters({"x-hold-background": False})
            for side in (source, target):
                assert side.service.wait(30) == "postcopy-paused", side.service.query()
            error = str(target.service.query()["error-desc"])
            assert "no free huge page of 2048 KiB" in error, error
            assert "raise nr_hugepages, then recover" in error
            assert target.machine.statistics()["touch_errors"] == 0
        finally:
            thief.close()
        listening = target.service.recover(f"unix:{tmp_path}/again")
        source.service.migrate(listening, resume=True)
        source.wait_status("completed")
        target.wait_status("completed")
        assert target.machine.statistics()["touch_errors"] == 0
        target.assert_sweep_clean()


def steal_reservation(target: Side) -> RAMBlock:
    """Make the kernel forget that the missing pages were promised, and take them for ourselves.

    A promise goes with the page it was kept with: so each page is placed and punched out again.
    """
    block = main_block(target)
    incoming = target.service.incoming.migration
    assert incoming is not None
    sensitised = incoming._parts.memory.sensitised
    assert sensitised is not None
    received = incoming.ram.received["toy.ram"]
    zeros = bytes(HUGE)
    for offset in range(0, block.used_length, HUGE):
        assert not received.test(offset // PAGE), "a page came before it could be stolen"
        sensitised.uffd.copy(block.host + offset, zeros)
        punch_hole(block, offset)
    free = HugepagePool(HUGE).state().available
    assert free >= block.used_length // HUGE
    thief = RAMBlock.allocate("thief", free * HUGE, backing=Backing.HUGETLB)
    thief.advise(MADV_POPULATE_WRITE)  # hold them, not just the promise
    return thief


def punch_hole(block: RAMBlock, offset: int) -> None:
    """Without reserving anew, as RAMBlock.discard does."""
    assert block.fd is not None
    mode = lib.FALLOC_FL_PUNCH_HOLE | lib.FALLOC_FL_KEEP_SIZE
    assert lib.mem_fallocate(block.fd, mode, offset, HUGE) == 0


def test_the_error_has_a_type() -> None:
    """Callers can tell an empty pool from anything else."""
    record = ffi.new("struct mig_error *")
    record.code = errno.ENOSPC
    record.message = b"no free huge page"
    error = native_error(record, fallback="")
    assert isinstance(error, HugepagesExhausted)
    assert str(error) == "no free huge page"
