"""Children that a process forks while part of its memory is aside: each gets its pages too."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

from uffd import Fork, PageAlreadyPresent, UffdError, Userfaultfd

from .errors import TraceeError
from .memory import populated, read_memory
from .plan import Plan


class Forks:
    """A ``with`` block in which every fork of the process is noticed.

    A fork waits in the kernel until its event has been read, and ptrace(2) cannot stop the thread
    while it waits: so a thread of ours reads, while another stops the process.

    :param uffd: non-blocking, of the process, with ``EVENT_FORK``. Nothing else may read from it.
    :ivar filled: children that have their pages. :ivar lost: children whose pages went with their
        parent, killed in that moment; such pages raise SIGBUS there (Linux 6.6; zeros before).
    """

    def __init__(self, uffd: Userfaultfd, plan: Plan) -> None:
        self._uffd = uffd
        self._plan = plan
        self.filled = self.lost = 0

    def __enter__(self) -> Self:
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._listen, name="forks")
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)

    def _listen(self) -> None:
        for event in self._uffd.events(stop=self._stop):
            if isinstance(event, Fork):
                # Closing it wakes whoever waits there for a page that never was.
                with event.child as child:
                    self._fill(child)

    def _fill(self, child: Userfaultfd) -> None:
        """The child has the old pages aside, as its parent has; its empty place gets a copy."""
        plan = self._plan
        try:
            for offset, length in populated(plan.pid, plan.aside, plan.length):
                page = read_memory(plan.pid, plan.aside + offset, length)
                _place(child, plan.start + offset, page)
            self.filled += 1
        except TraceeError:
            self.lost += 1
            _give_up(child, plan)
        except UffdError:
            pass  # it has ended, or unmapped the place


def _place(child: Userfaultfd, address: int, page: bytes) -> None:
    with suppress(PageAlreadyPresent):  # forked before its pages were moved aside
        child.copy(address, page)


def _give_up(child: Userfaultfd, plan: Plan) -> None:
    page = os.sysconf("SC_PAGE_SIZE")
    for address in range(plan.start, plan.end, page):
        try:
            child.poison(address, page)
        except PageAlreadyPresent:
            continue
        except UffdError:
            return
