"""When a VM's process ends: signals and ``quit``, waited for natively by the main thread.

SIGINT, SIGTERM and SIGHUP are blocked in every thread and fetched with sigwaitinfo(2), which waits
without the GIL and runs no handler inside anybody's system call: Ctrl-C works while other threads
sleep in page faults, and no vCPU or migration thread is ever interrupted by it.
"""

from __future__ import annotations

import collections
import os
import select
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass

END_SIGNALS = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP})
WAKE_SIGNAL = signal.SIGRTMIN + 9  # +5 kicks vCPUs, +7 is the watchdog's
"""Wakes the main thread for :meth:`EndWaiter.request`; sent to that thread only, never handled."""


@dataclass(frozen=True)
class End:
    """Why the process should end.

    :ivar cause: QEMU's ``ShutdownCause``: ``host-signal``, ``host-qmp-quit``, ``host-error``.
    :ivar text: the same for people.
    :ivar status: exit status this means.
    """

    cause: str
    text: str
    status: int = 0


class EndWaiter:
    """Made by the main thread before any other thread exists (they inherit the blocked signals)."""

    def __init__(self) -> None:
        self._mask = END_SIGNALS | {WAKE_SIGNAL}
        self._old_mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._mask)
        self._main = threading.get_ident()
        self._requests: collections.deque[End] = collections.deque()
        self._is_over = False

    def request(self, end: End) -> None:
        """Ask the main thread to end the process. Any thread; returns at once."""
        if self._is_over:
            return
        self._requests.append(end)
        signal.pthread_kill(self._main, WAKE_SIGNAL)

    def wait(self) -> End:
        """Sleep until a signal or a request comes. The main thread only."""
        while True:
            info = signal.sigwaitinfo(self._mask)
            if info.si_signo != WAKE_SIGNAL:
                name = signal.Signals(info.si_signo).name
                return End("host-signal", f"{name} from process {info.si_pid}")
            if self._requests:
                return self._requests.popleft()

    def close(self) -> None:
        """Give the signals back. The main thread only; nothing is requested any more."""
        self._is_over = True
        while signal.sigtimedwait({WAKE_SIGNAL}, 0) is not None:
            pass
        signal.pthread_sigmask(signal.SIG_SETMASK, self._old_mask)


def end_with_parent(parent: int, on_end: Callable[[], None]) -> None:
    """Call ``on_end`` from a thread when the process ``parent`` is gone (at once if it is already).

    A pidfd cannot be fooled by a reused process id, and unlike ``PR_SET_PDEATHSIG`` it is not tied
    to the thread of the parent that started us. Source: pidfd_open(2).
    """
    try:
        pidfd = os.pidfd_open(parent)
    except ProcessLookupError:
        on_end()
        return
    if os.getppid() != parent:  # it ended before the pidfd was open: that may be anybody's
        os.close(pidfd)
        on_end()
        return

    def watch() -> None:
        select.select([pidfd], [], [])
        on_end()

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
