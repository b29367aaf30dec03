"""What the keeper does when the tracer is dead and the program is not idle meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from migration.tracee import changes
from migration.tracee.calls import borrow
from migration.tracee.errors import TraceeError
from migration.tracee.forks import Forks
from migration.tracee.keeper import Keeper
from migration.tracee.replace import plan_replacement, replace_with_hugepages
from migration.tracee.threads import StoppedThreads
from tests.support.need import need
from tests.support.tracee import HUGE, TIMEOUT_S, Target, target
from tests.support.uffd_memory import hugepages
from uffd import Feature, kernel_support

pytestmark = pytest.mark.kernel

_IO_URING_SETUP, _MMAP = 425, 9


@contextmanager
def empty_place(it: Target, pages: int) -> Iterator[Keeper]:
    """A replacement whose tracer went away with the old pages aside."""
    need(os.geteuid() == 0, "EVENT_FORK", remedy="run as root")
    with StoppedThreads(it.pid) as stopped:
        start = -(-it.start // HUGE) * HUGE
        plan = plan_replacement(it.pid, start, pages * HUGE, HUGE, stopped.tids)
        keeper = Keeper(plan)
        with borrow(it.pid, stopped.tids) as thread:
            fd = changes.open_userfaultfd(thread)
            keeper.take(fd)
            changes.close(thread, fd)
            changes.map_fresh(thread, plan)
            keeper.guard()
            changes.move_aside(thread, plan)
    try:
        yield keeper
    finally:
        keeper.finish()


def wait_in_fork(it: Target) -> None:
    """Until its main thread forks and waits for somebody to notice."""
    until = time.monotonic() + TIMEOUT_S
    where = Path(f"/proc/{it.pid}/wchan")
    while "userfaultfd_event_wait" not in where.read_text():
        assert time.monotonic() < until, where.read_text()
        time.sleep(0.001)


def test_a_child_forked_while_the_place_is_empty_has_its_pages() -> None:
    """The fork waits in the kernel where ptrace cannot stop it; the child finds no zero."""
    with target(8 * HUGE) as it, hugepages(4):
        before = it.total
        with empty_place(it, 4) as keeper:
            os.kill(it.pid, signal.SIGUSR1)
            wait_in_fork(it)
            assert keeper.recover() == "undone"
            it.wait_word("c")
        it.assert_well()
        it.wait_quiet(before)


def test_a_child_whose_pages_are_lost_never_reads_zeros() -> None:
    """Its parent ended before they could be copied: SIGBUS."""
    gone = subprocess.Popen(["true"])
    gone.wait()
    with target(8 * HUGE) as it, hugepages(4):
        with empty_place(it, 4) as keeper:
            need(Feature.POISON in kernel_support().features, "UFFDIO_POISON (Linux 6.6)")
            assert keeper.uffd is not None
            with Forks(keeper.uffd, replace(keeper.plan, pid=gone.pid)):
                os.kill(it.pid, signal.SIGUSR1)
                it.wait_word("b")
            assert keeper.recover() == "undone"
        it.assert_well()


def test_a_program_that_ends_meanwhile_ends_the_keeper() -> None:
    with target(8 * HUGE) as it, hugepages(4), empty_place(it, 4) as keeper:
        os.kill(it.pid, signal.SIGUSR1)
        wait_in_fork(it)
        it.process.kill()
        it.process.wait()
        assert keeper.recover() == "gone"


def test_memory_that_io_uring_may_hold_is_refused() -> None:
    with target(8 * HUGE) as it:
        with StoppedThreads(it.pid) as stopped, borrow(it.pid, stopped.tids) as thread:
            parameters = thread.call(_MMAP, 0, 4096, 3, 0x22, -1, 0)
            ring = thread.call(_IO_URING_SETUP, 1, parameters)
        need(ring >= 0, "io_uring", remedy="sysctl kernel.io_uring_disabled=0")
        start = -(-it.start // HUGE) * HUGE
        with pytest.raises(TraceeError, match="io_uring"):
            replace_with_hugepages(it.pid, start, HUGE, HUGE)
        it.assert_well()
