"""Guests whose RAM is mostly holes: found without a look at them, not sent, zero at the other end;
many blocks; the room they need is what they hold.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from guestmem import Backing, RAMBlock
from tests.support.e2e_leaks import nothing_left
from tests.support.e2e_start import migrate_by_postcopy
from tests.support.pair import MIB, Side, pair

pytestmark = [pytest.mark.kernel, pytest.mark.e2e]

GIB = 1 << 30
PAGE = 4096
#: More than most hosts have; ``make test-scale`` asks for 1 TiB.
RAM = int(os.environ.get("POSTCOPY_SCALE_GIB", "64")) * GIB
#: 8 MiB of it filled, the ring at its end.
SPARSE: dict[str, Any] = {"ram_bytes": RAM, "fill_share": 8 * MIB / RAM}


def page_table_bytes() -> int:
    found = re.search(r"VmPTE:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) << 10


def main_block(side: Side) -> RAMBlock:
    return next(iter(side.machine.ram))


@pytest.mark.parametrize("postcopy", [True, False], ids=["postcopy", "precopy"])
@pytest.mark.parametrize("backing", [Backing.ANON, Backing.MEMFD])
def test_holes_stay_holes_at_both_ends(backing: Backing, postcopy: bool, tmp_path: Path) -> None:
    before = page_table_bytes()
    with nothing_left(), pair(backing=backing, postcopy=postcopy, **SPARSE) as (source, target):
        source.machine.start()
        target.service.migrate_incoming(f"unix:{tmp_path}/m")
        if postcopy:
            migrate_by_postcopy(source.service, f"unix:{tmp_path}/m")
        else:
            source.service.set_parameters({"downtime-limit": 60_000})
            source.service.migrate(f"unix:{tmp_path}/m")
        assert source.service.wait(60) == "completed", source.service.query()
        assert target.service.wait(60) == "completed", target.service.query()
        assert source.figures["features"].count("SPARSE") == 1
        # All but the filled pages, the ring, and what shares their 64 KiB.
        pages = RAM // PAGE
        assert source.figures["hole-pages"] > pages - 4096
        sent = source.service.query()["ram"]
        assert isinstance(sent, dict)
        assert sent["duplicate"] < 4096
        for side in (source, target):
            assert main_block(side).populated().count() < 4 * 8 * MIB // PAGE
        # Tables for all of 64 GiB would be 128 MiB a side.
        assert page_table_bytes() - before < 16 * MIB
        target.assert_sweep_clean()
        assert main_block(target).populated().count() < 4 * 8 * MIB // PAGE


def test_a_hole_touched_before_the_end_reads_as_zero_without_asking(tmp_path: Path) -> None:
    """While pages are missing a page that never was one is not among them."""
    with nothing_left(), pair(smp=0, ring_pages=0, **SPARSE) as (source, target):
        source.service.set_parameters({"x-hold-background": True})
        source.machine.start()
        target.service.migrate_incoming(f"unix:{tmp_path}/m")
        migrate_by_postcopy(source.service, f"unix:{tmp_path}/m")
        target.wait_event("RESUME")
        block = main_block(target)
        asked = target.figures["page-requests"]
        for offset in (RAM // 2, RAM - PAGE):
            assert block.read(offset, PAGE) == bytes(PAGE)
        block.write(RAM // 3 & ~(PAGE - 1), b"new here")
        assert target.figures["page-requests"] == asked
        assert target.figures["resolved-locally"] >= 3
        # and one that does exist is asked for
        assert block.read(0, 8) == main_block(source).read(0, 8) != bytes(8)
        assert target.figures["page-requests"] == asked + 1
        block.write(RAM // 3 & ~(PAGE - 1), bytes(8))
        source.service.set_parameters({"x-hold-background": False})
        assert source.service.wait(60) == "completed", source.service.query()
        assert target.service.wait(60) == "completed"
        target.assert_sweep_clean()


@pytest.mark.parametrize("postcopy", [True, False], ids=["postcopy", "precopy"])
@pytest.mark.parametrize("backing", [Backing.ANON, Backing.MEMFD])
def test_what_is_written_into_a_hole_meanwhile_arrives(
    backing: Backing, postcopy: bool, tmp_path: Path
) -> None:
    """First touched after it was told of as a hole, in a part of RAM where nothing was."""
    with nothing_left(), pair(backing=backing, smp=0, ring_pages=0, **SPARSE) as (source, target):
        # So slow that it cannot be over before everything here is done.
        source.service.set_parameters({"downtime-limit": 0, "max-bandwidth": 64 << 10})
        source.machine.start()
        target.service.migrate_incoming(f"unix:{tmp_path}/m")
        source.service.migrate(f"unix:{tmp_path}/m")
        source.wait_status("active")
        main_block(source).write(RAM // 2, b"in a hole")
        main_block(source).read(RAM // 8 * 5, PAGE)  # a look makes no contents
        main_block(source).write(RAM - PAGE, b"at the end")
        if postcopy:
            source.service.start_postcopy()
        else:
            source.service.set_parameters({"max-bandwidth": 0})
        assert source.service.wait(60) == "completed", source.service.query()
        assert target.service.wait(60) == "completed"
        assert main_block(target).read(RAM // 2, 10) == b"in a hole\0"
        assert main_block(target).read(RAM // 8 * 5, PAGE) == bytes(PAGE)
        assert main_block(target).read(RAM - PAGE, 11) == b"at the end\0"


def test_without_the_feature_every_page_is_sent(tmp_path: Path) -> None:
    with nothing_left(), pair(ram_bytes=32 * MIB, fill_share=0.25) as (source, target):
        source.service.set_parameters({"x-sparse": False})
        source.machine.start()
        target.service.migrate_incoming(f"unix:{tmp_path}/m")
        migrate_by_postcopy(source.service, f"unix:{tmp_path}/m")
        assert source.service.wait(60) == "completed", source.service.query()
        assert target.service.wait(60) == "completed"
        assert source.figures["hole-pages"] == 0
        assert "SPARSE" not in source.figures["features"]
        target.assert_sweep_clean()


def test_holes_survive_a_pause(tmp_path: Path) -> None:
    with nothing_left(), pair(**SPARSE) as (source, target):
        source.service.set_parameters({"x-hold-background": True})
        source.machine.start()
        target.service.migrate_incoming(f"unix:{tmp_path}/m")
        migrate_by_postcopy(source.service, f"unix:{tmp_path}/m")
        target.wait_event("RESUME")
        source.wait_status("postcopy-active")
        source.service.pause()
        for side in (source, target):
            side.wait_status("postcopy-paused")
        source.service.set_parameters({"x-hold-background": False})
        source.service.migrate(target.service.recover(f"unix:{tmp_path}/again"), resume=True)
        source.wait_status("completed")
        target.wait_status("completed")
        target.assert_sweep_clean()
        assert main_block(target).populated().count() < 4 * 8 * MIB // PAGE
