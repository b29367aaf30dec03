"""A running program gets huge pages from outside and notices nothing, whatever becomes of us."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from migration.tracee import changes
from migration.tracee.calls import borrow
from migration.tracee.errors import TraceeError, TraceeGone
from migration.tracee.look import look
from migration.tracee.replace import replace_with_hugepages
from migration.tracee.threads import StoppedThreads
from tests.support.need import need
from tests.support.tracee import HUGE, Target, killed_at_request, target
from tests.support.uffd_memory import hugepages

pytestmark = pytest.mark.kernel

GETPID, MMAP, MUNMAP = 39, 9, 11
# A whole replacement makes about 80 requests; `make test-tracer` kills after each of them.
FULL = os.environ.get("POSTCOPY_TRACER") == "full"
KILL_AT = range(1, 100) if FULL else (3, 17, 24, 31, 38, 46, 53, 61, 70)


def test_calls_made_for_us_leave_no_trace() -> None:
    with target(8 * HUGE) as it:
        it.assert_well()
        before = it.total
        for _ in range(5):
            with StoppedThreads(it.pid) as stopped, borrow(it.pid, stopped.tids) as thread:
                assert len(stopped.tids) == 5
                assert thread.call(GETPID) == it.pid
                at = thread.call(MMAP, 0, HUGE, 3, 0x22, -1, 0)
                assert at > 0
                assert thread.call(MUNMAP, at, HUGE) == 0
                assert thread.call(MUNMAP, 1, HUGE) < 0
            it.assert_well()
        assert it.total == before


def test_huge_pages_take_the_place() -> None:
    with target(16 * HUGE) as it, hugepages(8):
        before = it.total
        start = -(-it.start // HUGE) * HUGE
        done = replace_with_hugepages(it.pid, start, 8 * HUGE, HUGE)
        assert done.copied == 8 * HUGE
        it.assert_well()
        found = it.mapping(start)
        assert (found.start, found.end, found.page_size) == (start, start + 8 * HUGE, HUGE)
        assert found.rss == found.huge == 8 * HUGE
        it.wait_quiet(before)


def test_signals_meanwhile_are_neither_lost_nor_early() -> None:
    """SIGCHLD, ignored by default, interrupts and is delivered a thousand times meanwhile."""
    with target(8 * HUGE) as it, hugepages(2):
        stop = threading.Event()

        def pester() -> None:
            while not stop.wait(0.001):
                os.kill(it.pid, signal.SIGCHLD)

        thread = threading.Thread(target=pester)
        thread.start()
        try:
            start = -(-it.start // HUGE) * HUGE
            replace_with_hugepages(it.pid, start, 2 * HUGE, HUGE)
            it.assert_well()
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("number", KILL_AT)
def test_the_tracer_killed_at_any_request(number: int) -> None:
    """The program goes on with its memory whole: old pages or new ones, never none, nobody left
    registered, nothing left over."""
    with target(8 * HUGE) as it, hugepages(4):
        it.assert_well()  # all its threads have their stacks
        start = -(-it.start // HUGE) * HUGE
        before = it.total
        was_killed = killed_at_request(
            number, lambda: replace_with_hugepages(it.pid, start, 4 * HUGE, HUGE)
        )
        it.assert_well()
        it.wait_quiet(before)
        it.assert_well()
        assert was_killed or it.mapping(start).is_hugetlb


def test_what_cannot_be_is_refused_and_the_program_goes_on() -> None:
    with target(8 * HUGE) as it:
        start = -(-it.start // HUGE) * HUGE
        with pytest.raises(TraceeError, match="whole pages"):
            replace_with_hugepages(it.pid, start + 4096, HUGE, HUGE)
        with pytest.raises(TraceeError, match="not inside one mapping"):
            replace_with_hugepages(it.pid, start, 1 << 40, HUGE)
        free = _free_pages()
        with pytest.raises(TraceeError, match="pool does not have") as caught:
            replace_with_hugepages(it.pid, start, HUGE * 7, HUGE) if free < 7 else _use_up(it)
        assert "reserve" in str(caught.value.hint)
        it.assert_well()
    with pytest.raises(TraceeGone):
        replace_with_hugepages(it.pid, start, HUGE, HUGE)


def _free_pages() -> int:
    from guestmem.pools import HugepagePool

    return HugepagePool(HUGE).state().available


def _use_up(it: Target) -> None:
    """Ask for more than there is: of a mapping made for it, in the program itself."""
    pages = _free_pages() + 1
    with StoppedThreads(it.pid) as stopped, borrow(it.pid, stopped.tids) as thread:
        at = thread.call(MMAP, 1 << 41, (pages + 1) * HUGE, 3, 0x22 | 0x4000, -1, 0)
    replace_with_hugepages(it.pid, -(-at // HUGE) * HUGE, pages * HUGE, HUGE)


def test_a_look_tells_who_watches_and_who_waits() -> None:
    """A userfaultfd made inside the program shows with its registration."""
    with target(8 * HUGE) as it:
        with StoppedThreads(it.pid) as stopped, borrow(it.pid, stopped.tids) as thread:
            need(os.geteuid() == 0, "a userfaultfd of the program's", remedy="run as root")
            fd = changes.open_userfaultfd(thread)
        view = look(it.pid)
        assert [context.fd for context in view.contexts] == [fd]
        assert view.contexts[0].features is None
        assert view.thread_count == 5
        assert any(m.start <= it.start < m.end for m in view.mappings)
        it.assert_well()
