"""Find the hang that nothing else can report: a thread asleep on a missing page *with* the
interpreter lock.

A small Python thread counts a heartbeat; a native thread, which needs no lock, watches it. When
it stands still while a thread of this process sleeps in a userfault, a report is written: thread
id and name, address, the kernel function and stack (where readable), the Python tracebacks of all
threads. Depending on :attr:`Watchdog.end_process` the process then ends, or waits on. No page is
ever invented.

A long C call that holds the lock looks the same if some other thread happens to sleep on a page
at the time; choose ``stale_ms`` above the longest such call before ending processes.
"""

import faulthandler
import os
import signal
import threading
from types import TracebackType
from typing import Any, Self

from uffd._native import ffi, lib
from uffd.errors import error_for
from uffd.fd import Userfaultfd
from uffd.handler import FaultHandler
from uffd.pending import PendingFaults
from uffd.threads import NamedThread

EXIT_STATUS = 70  # EX_SOFTWARE
_REPORT, _END = 0, 1


class Watch:
    """What a watchdog looks at; :meth:`close` before the table or the context goes away."""

    def __init__(self, watchdog: "Watchdog", index: int, keep: object) -> None:
        self._watchdog = watchdog
        self._index = index
        self._keep = keep

    def close(self) -> None:
        index, self._index = self._index, -1
        if index >= 0:
            self._watchdog.unwatch(index)


class Watchdog:
    """One per process is enough. A context manager that starts and stops.

    :param stale_ms: how long the heartbeat may stand still.
    :param report_fd: where reports are written with write(2).
    :param end_process: the mode to start with, see :attr:`end_process`.
    :param exit_status: of a process it ends.
    :param traceback_signal: a signal nobody else uses; ``None`` leaves Python tracebacks out. It
        is raised only on the watchdog's own thread.
    """

    def __init__(
        self,
        *,
        stale_ms: int = 2000,
        report_fd: int = 2,
        end_process: bool = False,
        exit_status: int = EXIT_STATUS,
        traceback_signal: int | None = signal.SIGRTMIN + 7,
    ) -> None:
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stopped = threading.Event()
        self._interval_s = stale_ms / 4000
        self._report_fd = report_fd
        self._signal = traceback_signal
        self._threads: list[threading.Thread] = []
        self._core: Any = ffi.new("struct watchdog *")
        result = lib.watchdog_init(
            self._core, self._stop_fd, report_fd, stale_ms, traceback_signal or 0, exit_status
        )
        if result < 0:
            os.close(self._stop_fd)
            raise error_for(-result, "watchdog")
        self.end_process = end_process

    @property
    def end_process(self) -> bool:
        """Whether a hang ends the process, or is only reported. May be set at any time, from any
        thread.

        Report only while the page source lives and needs no Python; end the process when nobody
        will bring the page: the source is gone, or it is a Python callable.
        """
        return self._end_process

    @end_process.setter
    def end_process(self, value: bool) -> None:
        self._end_process = value
        lib.watchdog_set_action(self._core, _END if value else _REPORT)

    @property
    def address(self) -> int:
        """``struct watchdog *`` as an integer, for other extensions."""
        return int(ffi.cast("uintptr_t", self._core))

    @property
    def report_count(self) -> int:
        return lib.watchdog_reports(self._core)

    def watch(self, pending: PendingFaults | None = None, uffd: Userfaultfd | None = None) -> Watch:
        """Watch a table of outstanding faults, a context of this process's own memory, or both.

        The context tells how many threads wait even if nobody has read their messages.

        :raises UffdError: ENOSPC: sixteen watches at most.
        """
        table = ffi.NULL if pending is None else pending.pointer
        index = lib.watchdog_watch(self._core, table, -1 if uffd is None else uffd.fileno())
        if index < 0:
            raise error_for(-index, "watchdog")
        return Watch(self, index, (pending, uffd))

    def watch_handler(self, handler: FaultHandler) -> Watch:
        """Watch a handler; one whose source is a Python callable sets :attr:`end_process`."""
        if handler.needs_python:
            self.end_process = True
        return self.watch(handler.pending, handler.uffd)

    def unwatch(self, index: int) -> None:
        """Waits for a report in progress."""
        lib.watchdog_unwatch(self._core, index)

    def start(self) -> None:
        """:raises ValueError: running already."""
        if self._threads:
            raise ValueError("the watchdog is running")
        if self._signal is not None:
            faulthandler.register(self._signal, file=self._report_fd, all_threads=True, chain=False)
        self._threads = [
            NamedThread(target=self._beat, name="uffd-heartbeat", daemon=True),
            NamedThread(
                target=lib.watchdog_run, args=(self._core,), name="uffd-watchdog", daemon=True
            ),
        ]
        for thread in self._threads:
            thread.start()

    def _beat(self) -> None:
        while not self._stopped.wait(self._interval_s):
            lib.watchdog_beat(self._core)

    def close(self) -> None:
        """Stop both threads and free everything."""
        if self._stop_fd < 0:
            return
        self._stopped.set()
        os.eventfd_write(self._stop_fd, 1)
        for thread in self._threads:
            thread.join()
        if self._threads and self._signal is not None:
            faulthandler.unregister(self._signal)
        self._threads = []
        lib.watchdog_deinit(self._core)
        os.close(self._stop_fd)
        self._stop_fd = -1

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
