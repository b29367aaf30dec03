"""What the synchronous tracker must do beyond the asynchronous one: answer faults by itself."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestmem import Bitmap, DirtyTrackingError, RAMBlock, RAMList, TrackerKind, WpSyncTracker
from tests.support.guestmem_memory import BASE, Kind, kind_of_memory, open_fds
from tests.support.guestmem_writer import Writer, build_writer
from tests.support.need import need

pytestmark = pytest.mark.kernel

PAGES = 8


@pytest.fixture(params=["anon", "memfd", "hugetlb"])
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Kind]:
    """Each kind of memory in turn."""
    with kind_of_memory(request.param, tmp_path) as kind:
        yield kind


def started(ram: RAMList, **options: bool) -> WpSyncTracker:
    """A started tracker; skips where it cannot be."""
    tracker = WpSyncTracker(ram, **options)
    try:
        tracker.start()
    except DirtyTrackingError as error:
        need(False, str(error), remedy="Linux 5.19, and root or /dev/userfaultfd")
    return tracker


def test_a_writer_that_holds_the_gil_is_served(kind: Kind) -> None:
    """The store below sleeps in the kernel with the GIL held: only native code can wake it."""
    with kind.block(pages=PAGES) as block:
        tracker = started(RAMList([block]))
        view = block.unsafe_view()
        for round_ in range(20):
            into = {"ram": Bitmap(block.page_count)}
            for page in range(PAGES):
                view[page * kind.page_size + 3] = round_
            assert tracker.sync(into) == block.page_count
        view.release()
        assert tracker.fault_count >= 20 * PAGES
        tracker.stop()


def test_stopping_lets_every_writer_go(kind: Kind, tmp_path: Path) -> None:
    """The handler takes the protection off before it ends: nobody is left asleep, whoever holds the
    GIL. Writers that keep faulting see tracker after tracker come and go."""
    library, fds = build_writer(tmp_path), open_fds()
    with kind.block(pages=PAGES) as block:
        ram = RAMList([block])
        before = open_fds()
        writers = [Writer(library, block) for _ in range(2)]
        for _ in range(10):
            tracker = started(ram)
            into = {"ram": Bitmap(block.page_count)}
            while not tracker.sync(into):
                pass
            view = block.unsafe_view()
            view[5] = 1
            view.release()
            tracker.stop()
        assert all(writer.stop() for writer in writers)
        assert open_fds() == before
    assert open_fds() == fds
    assert not [t for t in threading.enumerate() if t.name == "dirty-wp-sync"]


def test_two_mappings_are_each_protected_again(kind: Kind, tmp_path: Path) -> None:
    """A writer on the block and one on its alias race the collector; no write of either is lost."""
    if kind.name == "anon":
        pytest.skip("private memory has no alias")
    library = build_writer(tmp_path)
    with kind.block(pages=PAGES) as block:
        alias = block.add_alias()
        tracker, copies = started(RAMList([block])), bytearray(block.used_length)
        writers = [Writer(library, block), Writer(library, block, host=alias.host)]
        for _ in range(200 if kind.page_size == BASE else 20):
            copy_written(tracker, block, copies)
        assert all(writer.stop() for writer in writers)
        copy_written(tracker, block, copies)
        assert copies == block.read(0, block.used_length)
        tracker.stop()


def copy_written(tracker: WpSyncTracker, block: RAMBlock, copies: bytearray) -> None:
    """One round of precopy."""
    into = {block.idstr: Bitmap(block.page_count)}
    tracker.sync(into)
    for first, count in into[block.idstr].runs():
        copies[first * BASE : (first + count) * BASE] = block.read(first * BASE, count * BASE)


@pytest.mark.parametrize("may_protect_holes", [True, False])
def test_a_page_discarded_is_seen_when_written_after_the_next_sync(
    kind: Kind, may_protect_holes: bool
) -> None:
    """A hole has lost its protection; the sync that reports the discard must renew it."""
    with kind.block(pages=PAGES) as block:
        tracker = started(RAMList([block]), may_protect_holes=may_protect_holes)
        block.write(kind.page_size, b"x")
        into = {"ram": Bitmap(block.page_count)}
        tracker.sync(into)
        block.discard(kind.page_size, kind.page_size)
        into["ram"].clear_all()
        tracker.sync(into)
        into["ram"].clear_all()
        block.write(kind.page_size, b"y")
        per_page = kind.page_size // BASE
        assert tracker.sync(into) == per_page
        assert into["ram"].next_run() == (per_page, per_page)
        tracker.stop()


_UNPRIVILEGED = """
import ctypes, os
from guestmem import Bitmap, RAMBlock, RAMList, WpSyncTracker
os.setgroups([]); os.setgid(65534); os.setuid(65534)
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # dumpable again, as a process that never was root is
with RAMBlock.allocate("ram", 1 << 20) as block:
    tracker, into = WpSyncTracker(RAMList([block])), {"ram": Bitmap(block.page_count)}
    tracker.start()
    block.write(5, b"x")
    assert tracker.sync(into) == 1
    print(tracker.opening.user_mode_only)
    tracker.stop()
"""


def test_threads_are_tracked_without_privilege() -> None:
    """A user-mode-only context is enough for them; KVM asks for more and would be refused."""
    started(RAMList([])).stop()
    done = subprocess.run(
        [sys.executable, "-c", _UNPRIVILEGED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    refused = _UNPRIVILEGED.replace("WpSyncTracker(RAMList([block]))", "WpSyncTracker("
        "RAMList([block]), user_mode_only=False)")  # fmt: skip
    if done.stdout.strip() == "True":
        done = subprocess.run(
            [sys.executable, "-c", refused], capture_output=True, text=True, check=False
        )
        assert "userfaultfd" in done.stderr.splitlines()[-1]


def test_it_tells_what_it_is() -> None:
    tracker = WpSyncTracker(RAMList([]))
    assert tracker.kind is TrackerKind.WP_SYNC
