"""Memory pressure while a migration runs: how long this host's tasks waited for memory, and an
alarm the moment it gets serious.

Source: kernel ``Documentation/accounting/psi.rst``.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from uffd.threads import NamedThread

PRESSURE = Path("/proc/pressure/memory")
STALL_US, WINDOW_US = 200_000, 2_000_000
"""The alarm: tasks waited for memory for so long within such a window. Without privileges the
kernel takes only windows of whole two seconds."""
_FIELD = re.compile(r"^(some|full) avg10=([\d.]+) .*total=(\d+)$", re.MULTILINE)

Alarm = Callable[[str], None]


@dataclass(frozen=True)
class Pressure:
    """One look. Times in milliseconds since the boot, shares in percent of the last ten seconds.

    :ivar some: at least one task waited for memory. :ivar full: all that could run did.
    """

    some_ms: float
    full_ms: float
    some_avg10: float
    full_avg10: float

    @staticmethod
    def read(path: Path = PRESSURE) -> Pressure | None:
        """Now; ``None`` on a kernel that does not tell (before 4.20, or switched off)."""
        try:
            found = {name: (avg, total) for name, avg, total in _FIELD.findall(path.read_text())}
            some, full = found["some"], found["full"]
        except (OSError, KeyError):
            return None
        return Pressure(int(some[1]) / 1000, int(full[1]) / 1000, float(some[0]), float(full[0]))


class PressureWatch:
    """From its making to :meth:`close`. Figures are for the whole host, whoever causes it.

    :ivar alarms: how often the alarm went.
    """

    def __init__(self, alarm: Alarm, path: Path = PRESSURE) -> None:
        """:param alarm: called with a sentence, from a thread of this watch, at the first alarm
        and then at most once a window. Not called where the kernel takes no trigger from us.
        """
        self._alarm = alarm
        self._path = path
        self._start = Pressure.read(path)
        self._last: Pressure | None = None
        self.alarms = 0
        self._is_frozen = False
        self._end_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._trigger_fd = self._trigger()
        self._thread: threading.Thread | None = None
        if self._trigger_fd >= 0:
            self._thread = NamedThread(target=self._watch, name="memory-pressure", daemon=True)
            self._thread.start()

    @property
    def has_alarm(self) -> bool:
        """The kernel tells us; otherwise there are only the figures."""
        return self._trigger_fd >= 0

    def figures(self) -> dict[str, object] | None:
        """For ``query-migrate``: waited since the start, shares now; ``None``: not known here."""
        now = self._last or Pressure.read(self._path)
        if now is None or self._start is None:
            return None
        return {
            "some-ms": round(now.some_ms - self._start.some_ms),
            "full-ms": round(now.full_ms - self._start.full_ms),
            "some-avg10": now.some_avg10,
            "full-avg10": now.full_avg10,
            "alarms": self.alarms,
        }

    def freeze(self) -> None:
        """The figures stay as they are, and no alarm goes any more. Any thread; never waits."""
        if not self._is_frozen:
            self._is_frozen = True
            self._last = Pressure.read(self._path)
            os.eventfd_write(self._end_fd, 1)

    def close(self) -> None:
        """End the thread and close everything. Not from an alarm."""
        self.freeze()
        if self._thread is not None:
            self._thread.join()
        for fd in (self._trigger_fd, self._end_fd):
            if fd >= 0:
                os.close(fd)
        self._trigger_fd = self._end_fd = -1

    def _trigger(self) -> int:
        with contextlib.suppress(OSError):
            fd = os.open(self._path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.write(fd, f"some {STALL_US} {WINDOW_US}\0".encode())
            except OSError:
                os.close(fd)
                raise
            return fd
        return -1

    def _watch(self) -> None:
        poll = select.poll()
        poll.register(self._trigger_fd, select.POLLPRI)
        poll.register(self._end_fd, select.POLLIN)
        while True:
            events = dict(poll.poll())
            if self._end_fd in events or events.get(self._trigger_fd, 0) & select.POLLERR:
                return
            self.alarms += 1
            now = Pressure.read(self._path)
            share = "" if now is None else f" ({now.some_avg10:g} % of the last ten seconds)"
            self._alarm(
                f"this host is short of memory: tasks waited {STALL_US // 1000} ms of "
                f"{WINDOW_US // 1000} for it{share}; the migration and the guest slow down"
            )
