"""Asks a push policy what to push next, and tells the native loop."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable
from typing import Any

from guestmem import RAMList
from guestmem.geometry import TARGET_PAGE_BITS
from migration.engine.policy import Observed, PageRange, PushPolicy
from migration.native import ffi, lib
from uffd.threads import NamedThread

BATCH_S = 0.005
CAPACITY = 1 << 18
"""Requests a policy hears of in one migration."""


class PushAdvisor:
    """A thread beside the migration thread. Nobody waits for it: while the policy thinks, requests
    are answered and the scan goes on.

    A policy that raises is asked no more; the migration goes on without it.
    """

    def __init__(
        self, source: Any, ram: RAMList, policy: PushPolicy, on_error: Callable[[str], None]
    ) -> None:
        """Before the return path is read; this object must outlive that.

        :param source: ``struct src *``, borrowed until the last :meth:`stop`.
        :param on_error: told once what went wrong, on the advisor's thread.
        """
        self._source = source
        self._policy = policy
        self._on_error = on_error
        self._names = [block.idstr for block in ram]
        self._index = {idstr: index for index, idstr in enumerate(self._names)}
        self._pages = {block.idstr: block.placed_length >> TARGET_PAGE_BITS for block in ram}
        self._log = ffi.new("struct src_log_entry[]", CAPACITY)
        self._seen = 0
        self._stopped = threading.Event()
        self._started_s = 0.0
        self._thread: threading.Thread | None = None
        lib.src_set_log(source, int(ffi.cast("uintptr_t", self._log)), CAPACITY)

    def start(self) -> None:
        """Postcopy begins, or goes on after a pause."""
        self._started_s = self._started_s or time.monotonic()
        self._stopped.clear()
        self._thread = NamedThread(target=self._run, name="outgoing-policy", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Returns when the policy is not asked any more. Harmless when it never was."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        try:
            self._advise(self._policy.next_pages(self._observe()))
            while not self._stopped.wait(BATCH_S):
                if int(lib.src_log_count(self._source)) > self._seen:
                    self._advise(self._policy.next_pages(self._observe()))
        except Exception as error:  # it is the user's code: anything may come out of it
            self._on_error(f"push policy {type(self._policy).__name__} failed: {error!r}")

    def _observe(self) -> Observed:
        count = min(int(lib.src_log_count(self._source)), CAPACITY)
        entries = [self._log[index] for index in range(self._seen, count)]
        self._seen = count
        return Observed(
            tuple(PageRange(self._names[e.block], int(e.first), int(e.count)) for e in entries),
            self._pages,
            int(lib.src_dirty_pages(self._source)),
            (time.monotonic() - self._started_s) * 1000,
        )

    def _advise(self, ranges: Any) -> None:
        for wanted in ranges:
            args = self._index[wanted.idstr], wanted.first, wanted.count
            result = lib.src_advise(self._source, *args)
            while result == -errno.EAGAIN:
                # Full: the loop has enough to do.
                if self._stopped.wait(BATCH_S):
                    return
                result = lib.src_advise(self._source, *args)
            if result < 0:
                raise ValueError(f"{wanted} is not in {self._pages}")
