"""Dirty tracking by write protection, asynchronous and synchronous, on the real kernel."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestmem import (
    TARGET_PAGE_BYTES,
    Backing,
    Bitmap,
    DirtyTracker,
    DirtyTrackingError,
    RAMBlock,
    RAMList,
    TrackingBusy,
    WpAsyncTracker,
    WpSyncTracker,
)
from tests.support.guestmem_faults import missing_watch
from tests.support.guestmem_memory import BASE, HUGE, Kind, kind_of_memory, open_fds
from tests.support.guestmem_writer import Writer, build_writer
from tests.support.need import need

pytestmark = pytest.mark.kernel

TRACKED_KINDS = ("anon", "memfd", "hugetlb", "tmpfs-file")


Tracker = WpAsyncTracker | WpSyncTracker
Make = Callable[[RAMList], Tracker]


def _without_hole_protection(ram: RAMList) -> WpSyncTracker:
    return WpSyncTracker(ram, may_protect_holes=False)


#: The last one as on a kernel before 6.4, by not asking for the feature.
MAKERS: dict[str, Make] = {
    "async": WpAsyncTracker,
    "sync": WpSyncTracker,
    "sync-no-holes": _without_hole_protection,
}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Make:
    """Each kind of tracker in turn."""
    return MAKERS[request.param]


def start(ram: RAMList, make: Make = WpAsyncTracker) -> Tracker:
    """A started tracker; skips where the kernel has no such write protection."""
    tracker = make(ram)
    try:
        tracker.start()
    except TrackingBusy:
        raise
    except DirtyTrackingError as error:
        need(error.errno not in (errno.EINVAL, errno.ENOSYS), str(error))
        raise
    return tracker


def bitmaps(ram: RAMList) -> dict[str, Bitmap]:
    """A clear bitmap for each block."""
    return {block.idstr: Bitmap(block.page_count) for block in ram}


@pytest.fixture(params=TRACKED_KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kind]:
    """Each kind of memory in turn."""
    with kind_of_memory(request.param, tmp_path) as kind:
        yield kind


@pytest.fixture
def block(kind: Kind) -> Iterator[RAMBlock]:
    """Eight host pages, the first two with contents."""
    with kind.block(pages=8) as block:
        block.fill(0, 2 * kind.page_size, 0x11)
        yield block


def dirty_host_pages(block: RAMBlock, into: dict[str, Bitmap]) -> list[int]:
    """Indexes of host pages set in the bitmap, which must be set whole."""
    per_page = block.page_size // TARGET_PAGE_BYTES
    found = into[block.idstr]
    pages = [i for i in range(found.nbits // per_page) if found.count(i * per_page, per_page)]
    assert found.count() == len(pages) * per_page
    return pages


def test_only_what_was_written_is_reported(block: RAMBlock, make: Make) -> None:
    ram, page = RAMList([block]), block.page_size
    tracker = start(ram, make)
    assert isinstance(tracker, DirtyTracker)
    into = bitmaps(ram)
    assert tracker.sync(into) == 0  # neither the populated pages nor the absent ones
    block.read(0, block.used_length)  # reading is not writing, of absent pages neither
    assert tracker.sync(into) == 0
    block.write(page + 5, b"x")  # a populated page
    block.write(5 * page, b"x")  # one that never was
    per_page = page // TARGET_PAGE_BYTES
    assert tracker.sync(into) == 2 * per_page
    assert dirty_host_pages(block, into) == [1, 5]
    assert tracker.sync(into) == 0
    block.write(page, b"y")
    assert tracker.sync(into) == 0  # its bit is still set: nothing new
    into[block.idstr].clear_all()
    block.write(page, b"z")
    assert tracker.sync(into) == per_page
    assert dirty_host_pages(block, into) == [1]
    tracker.stop()


def test_writes_by_system_calls_are_seen(block: RAMBlock, make: Make) -> None:
    ram, page = RAMList([block]), block.page_size
    tracker, into = start(ram, make), bitmaps(ram)
    with open("/dev/zero", "rb", buffering=0) as zero:
        view = block.unsafe_view()
        assert zero.readinto(view[3 * page : 3 * page + 100]) == 100
        view.release()
    tracker.sync(into)
    assert dirty_host_pages(block, into) == [3]
    tracker.stop()


def test_a_discarded_page_counts_as_written(block: RAMBlock, make: Make) -> None:
    ram, page = RAMList([block]), block.page_size
    tracker, into = start(ram, make), bitmaps(ram)
    block.discard(page, page)
    tracker.sync(into)
    assert dirty_host_pages(block, into) == [1]
    into[block.idstr].clear_all()
    block.write(page, b"again")
    tracker.sync(into)
    assert dirty_host_pages(block, into) == [1]
    tracker.stop()


def test_writes_through_an_alias_are_seen(block: RAMBlock, make: Make) -> None:
    if not block.is_shared:
        pytest.skip("private memory has no alias")
    ram, page = RAMList([block]), block.page_size
    twin = RAMBlock.allocate("twin", BASE)  # only to borrow its accessors
    alias = block.add_alias()
    tracker, into = start(ram, make), bitmaps(ram)
    home, twin.host = twin.host, alias.host + 6 * page
    twin.write(0, b"through the alias")
    twin.host = home
    twin.close()
    tracker.sync(into)
    assert dirty_host_pages(block, into) == [6]
    tracker.stop()


def test_noted_writes_are_reported_once(block: RAMBlock, make: Make) -> None:
    ram, page = RAMList([block]), block.page_size
    tracker, into = start(ram, make), bitmaps(ram)
    tracker.note_written(block.idstr, 2 * page + 1, page)
    tracker.sync(into)
    assert dirty_host_pages(block, into) == [2, 3]
    into[block.idstr].clear_all()
    assert tracker.sync(into) == 0
    with pytest.raises(ValueError, match="has no"):
        tracker.note_written(block.idstr, block.used_length, 1)
    with pytest.raises(KeyError):
        tracker.note_written("nobody", 0, 1)
    tracker.stop()


def test_populated_pages_are_told_from_protected_holes(block: RAMBlock, make: Make) -> None:
    """Protection leaves markers on absent pages; they must not pass for contents."""
    tracker = start(RAMList([block]), make)
    per_page = block.page_size // TARGET_PAGE_BYTES
    assert list(block.populated().runs()) == [(0, 2 * per_page)]
    # Where holes cannot be protected they were filled with zero pages, which are resident.
    is_filled = make is _without_hole_protection and not block.is_shared
    assert [block.is_resident(i * block.page_size) for i in range(3)] == [True, True, is_filled]
    tracker.stop()


def test_one_context_per_range_at_a_time(block: RAMBlock, make: Make) -> None:
    fds = open_fds()
    with missing_watch(block):
        with pytest.raises(TrackingBusy, match="another userfaultfd") as caught:
            start(RAMList([block]), make)
        assert caught.value.errno == errno.EBUSY
        assert caught.value.remedy
    assert open_fds() == fds
    start(RAMList([block]), make).stop()
    assert open_fds() == fds


def test_stopping_takes_all_protection_away(block: RAMBlock, make: Make) -> None:
    ram = RAMList([block])
    tracker = start(ram, make)
    (found,) = block.reports()
    assert "uw" in found.vm_flags
    tracker.stop()
    tracker.stop()
    (found,) = block.reports()
    assert "uw" not in found.vm_flags
    block.fill(0, block.used_length, 7)
    with pytest.raises(DirtyTrackingError, match="not started"):
        tracker.sync(bitmaps(ram))
    tracker.start()  # and may start anew
    assert tracker.sync(bitmaps(ram)) == 0
    with pytest.raises(DirtyTrackingError, match="already started"):
        tracker.start()
    assert tracker.is_started
    tracker.stop()


def test_bitmaps_that_do_not_fit_are_refused_before_anything_is_taken(
    block: RAMBlock, make: Make
) -> None:
    ram = RAMList([block])
    tracker = start(ram, make)
    block.write(0, b"x")
    with pytest.raises(ValueError, match="pages"):
        tracker.sync({block.idstr: Bitmap(block.page_count + 1)})
    with pytest.raises(KeyError):
        tracker.sync({})
    into = bitmaps(ram)
    tracker.sync(into)
    assert dirty_host_pages(block, into) == [0]
    tracker.stop()


def test_a_mapping_that_lost_its_protection_is_an_error(block: RAMBlock) -> None:
    """Memory mapped anew behind the tracker's back would lose writes silently: it is an error."""
    from guestmem._native import ffi, lib

    ram, out = RAMList([block]), ffi.new("uint64_t *")
    tracker = start(ram)
    flags = 0x01 if block.is_shared else 0x22
    fd = -1 if block.fd is None else block.fd
    size = block.page_size
    assert lib.mem_map(block.host, size, 3, flags | lib.MAP_FIXED, fd, 0, out) == 0
    with pytest.raises(DirtyTrackingError, match="scanning") as caught:
        tracker.sync(bitmaps(ram))
    assert caught.value.errno == errno.EPERM
    tracker.stop()


def test_the_last_huge_page_may_be_used_in_part(tmp_path: Path, make: Make) -> None:
    with kind_of_memory("hugetlb", tmp_path):
        block = RAMBlock.allocate("ram", HUGE + 3 * BASE, backing=Backing.HUGETLB)
        ram = RAMList([block])
        tracker, into = start(ram, make), bitmaps(ram)
        block.write(HUGE, b"x")
        assert tracker.sync(into) == 3
        assert list(into["ram"].runs()) == [(HUGE // TARGET_PAGE_BYTES, 3)]
        tracker.stop()
        ram.close()


@pytest.mark.parametrize("name", ["anon", "memfd", "hugetlb"])
def test_no_write_is_lost_against_a_racing_writer(name: str, make: Make, tmp_path: Path) -> None:
    """A native thread writes as fast as it can while pages are found, protected and copied. At the
    end, after one last sync, the copies equal the memory: each write was copied or reported."""
    library = build_writer(tmp_path)
    with kind_of_memory(name, tmp_path) as kind, kind.block(pages=8) as block:
        ram = RAMList([block])
        tracker, into = start(ram, make), bitmaps(ram)
        copies = bytearray(block.used_length)
        writer = Writer(library, block)
        # A round copies all eight pages, which is much for huge ones.
        rounds, busy_rounds = (300 if kind.page_size == BASE else 30), 0
        while busy_rounds < rounds:
            busy_rounds += copy_dirty(tracker, block, into, copies) > 0
        assert writer.stop() >= rounds
        copy_dirty(tracker, block, into, copies)
        assert copy_dirty(tracker, block, into, copies) == 0
        assert copies == block.read(0, block.used_length)
        tracker.stop()


_UNPRIVILEGED = """
import ctypes, os
from guestmem import Bitmap, RAMBlock, RAMList, WpAsyncTracker
os.setgroups([]); os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable again, as a process that never was root is
with RAMBlock.allocate("ram", 1 << 20) as block:
    tracker, into = WpAsyncTracker(RAMList([block])), {"ram": Bitmap(block.page_count)}
    tracker.start()
    block.write(5, b"x")
    with open("/dev/zero", "rb", buffering=0) as zero:
        zero.readinto(block.unsafe_view()[1 << 19 : (1 << 19) + 5])
    assert tracker.sync(into) == 2
    tracker.stop()
"""


def test_no_privilege_is_needed() -> None:
    """Protection is resolved inside the kernel, also for a write inside a system call."""
    need(os.geteuid() == 0, "giving up privileges needs some", remedy="run the tests as root")
    start(RAMList([])).stop()
    done = subprocess.run(
        [sys.executable, "-c", _UNPRIVILEGED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def copy_dirty(
    tracker: Tracker, block: RAMBlock, into: dict[str, Bitmap], copies: bytearray
) -> int:
    """One round of precopy: sync, then copy what is dirty."""
    fresh = tracker.sync(into)
    for first, count in into[block.idstr].runs():
        offset, length = first * TARGET_PAGE_BYTES, count * TARGET_PAGE_BYTES
        copies[offset : offset + length] = block.read(offset, length)
    into[block.idstr].clear_all()
    return fresh


def test_the_comparison_sees_a_write_lost_by_the_wrong_order() -> None:
    """Copying before protecting loses the write in between: the race test above would notice."""
    with RAMBlock.allocate("ram", 8 * BASE) as block:
        block.write(0, b"there")  # reading a hole of which nothing exists counts as writing it
        ram = RAMList([block])
        tracker, into = start(ram), bitmaps(ram)
        copies = bytearray(block.read(0, block.used_length))
        block.write(BASE, b"after the copy, before the protection")
        assert tracker.sync(into) == 1
        into["ram"].clear_all()  # "it was copied already"
        assert copy_dirty(tracker, block, into, copies) == 0
        assert copies != block.read(0, block.used_length)
        tracker.stop()
