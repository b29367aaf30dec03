"""Making huge pages of small ones that have all arrived, in the background."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from guestmem._native import ffi, lib
from guestmem.geometry import TARGET_PAGE_BYTES, THP_BYTES
from guestmem.ramblock import RAMBlock
from uffd.threads import NamedThread


class CollapseState(StrEnum):
    """Where it stands."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    STOPPED = "stopped"
    UNSUPPORTED = "unsupported"
    """This kernel (before 6.1) has no MADV_COLLAPSE, or refuses it for this memory."""


@dataclass(frozen=True, slots=True)
class CollapseReport:
    """Figures so far; regions are of 2 MiB, and counted once for each mapping of their block.

    :ivar region_count: that there are. :ivar collapsed: that are huge now.
    :ivar busy: the kernel could not: pages in use, or missing. :ivar no_memory: no free huge page.
    :ivar refused: for another reason. :ivar reason: the last error in words, empty without one.
    """

    state: CollapseState
    region_count: int
    collapsed: int
    busy: int
    no_memory: int
    refused: int
    elapsed_ms: float
    reason: str


class Collapser:
    """Collapses blocks of small pages, region by region, on a thread of its own and without the
    GIL. Whoever touches the memory meanwhile waits for one region at most (about a millisecond).

    Blocks of other page sizes are left alone. Aliases are done too, so that each mapping gets its
    large page table entry. Nothing is made up: the kernel refuses regions with a missing page
    while the memory is registered, so begin after the last page is in and the userfaultfd gone.

    ``MADV_COLLAPSE`` asks neither ``transparent_hugepage/enabled`` nor, for shared memory,
    ``shmem_enabled`` unless that says ``deny``; memory advised not to have huge pages is refused.

    Source: kernel ``Documentation/admin-guide/mm/transhuge.rst``; Linux 6.1.
    """

    def __init__(
        self,
        blocks: Iterable[RAMBlock],
        on_end: Callable[[CollapseReport], None] = lambda report: None,
    ) -> None:
        """:param on_end: called on the collapsing thread, however it ends. The blocks must stay
        open until :meth:`stop` returned."""
        self._ranges = [
            (mapping.host, block.used_length)
            for block in blocks
            if block.page_size == TARGET_PAGE_BYTES
            for mapping in block.mappings
        ]
        self._on_end = on_end
        self._native: Any = ffi.new("struct collapse *")
        self._state = CollapseState.WAITING
        self._error = 0
        self._started_ns = self._ended_ns = 0
        self._thread = NamedThread(target=self._run, name="guestmem-collapse", daemon=True)

    def start(self) -> None:
        """Begin. Once."""
        self._state = CollapseState.RUNNING
        self._started_ns = time.monotonic_ns()
        self._thread.start()

    def stop(self) -> None:
        """Stop after the region at hand and join the thread. Harmless when not started or done."""
        lib.collapse_stop(self._native)
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def report(self) -> CollapseReport:
        """Figures so far. Any thread."""
        stats: Any = ffi.new("struct collapse_stats *")
        lib.collapse_get(self._native, stats)
        error = self._error or int(stats.last_error)
        until = self._ended_ns or time.monotonic_ns()
        return CollapseReport(
            self._state,
            sum(_regions(start, length) for start, length in self._ranges),
            int(stats.done),
            int(stats.busy),
            int(stats.no_memory),
            int(stats.refused),
            (until - self._started_ns) / 1e6 if self._started_ns else 0.0,
            os.strerror(error) if error else "",
        )

    def _run(self) -> None:
        end = CollapseState.DONE
        for start, length in self._ranges:
            result = lib.collapse_range(self._native, start, length, THP_BYTES)
            if result == -errno.ECANCELED:
                end = CollapseState.STOPPED
                break
            if result < 0:
                end, self._error = CollapseState.UNSUPPORTED, -result
                break
        self._ended_ns = time.monotonic_ns()
        self._state = end
        self._on_end(self.report())


def _regions(start: int, length: int) -> int:
    first = -(-start // THP_BYTES)
    return max(0, (start + length) // THP_BYTES - first)
