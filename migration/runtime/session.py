"""The one migration there may be at a time, whichever way it goes: its status, its thread, and the
lock under which everybody decides what is to become of it.

**What it protects**: which migration there is. That is the session's own fields, those of the sides
(:class:`~migration.runtime.source.side.OutgoingSide`,
:class:`~migration.runtime.destination.side.IncomingSide`) and changes of the settings. Whoever
begins something looks whether it may *and* begins it under the lock, so that of two only one does.
A migration that runs has locks of its own.

**What is done without it**: all that may take long or waits for somebody. That is to connect, to
accept and gather connections, to run a migration, to cut it off or cancel it, and to join its
thread. The world goes on meanwhile: whoever takes the lock again looks again. A service closed in
between gets no new migration, or one that is abandoned by who made it.

**What is done with it all the same** is to join the thread of a migration that has ended, by who
begins the next. So from its last word on such a thread never wants the lock: who hears that word
may begin anew at once.

**Listeners** are called by whoever changed something, sometimes with the lock. They may ask the
service, but must not wait for another thread that asks it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from migration.engine.states import RESTING, Status, StatusInput
from uffd.threads import NamedThread

from .channel import Channel
from .errors import MigrationError
from .pressure import PressureWatch
from .report import SETTLED, Listeners, Report
from .snapshots.snapshots import Snapshots

_ENDED = frozenset({Status.COMPLETED.value, Status.FAILED.value, Status.CANCELLED.value})


class Session:
    """What is so of the current or last migration, outgoing or incoming.

    :ivar lock: see above; may be taken again by who holds it.
    :ivar report: of the current or last migration; None before the first one.
    :ivar is_connecting: one begins, or goes on, as soon as its connection stands.
    :ivar is_closed: nothing begins any more.
    """

    def __init__(self, listeners: Listeners, snapshots: Snapshots) -> None:
        self.lock = threading.RLock()
        self.report: Report | None = None
        self.is_connecting = False
        self.is_closed = False
        self._listeners = listeners
        self._snapshots = snapshots
        self._thread: threading.Thread | None = None
        self._pressure: PressureWatch | None = None
        self._left = ExitStack()

    # -- may something begin? -------------------------------------------------

    @property
    def status(self) -> Status:
        """Of the current or last migration."""
        return self.report.status if self.report else Status.NONE

    @property
    def is_running(self) -> bool:
        """A migration is under way, waited for or paused."""
        return self.status not in RESTING

    def refuse_while_running(self, doing: str) -> None:
        """:raises MigrationError: there is a migration or a snapshot under way, or the end."""
        if self.is_closed:
            raise MigrationError("the service is closed")
        if self.is_running:
            raise MigrationError(f"There's a migration process in progress: cannot {doing} now")
        if self._snapshots.is_busy:
            raise MigrationError(f"a snapshot is being saved or loaded: cannot {doing} now")

    def refuse_when_closed(self, channel: Channel) -> None:
        """:raises MigrationError: connected too late; the channel is closed."""
        if self.is_closed:
            channel.close()
            raise MigrationError("the service is closed")

    @contextmanager
    def no_migration(self, doing: str) -> Iterator[None]:
        """Nor any other snapshot meanwhile. :raises MigrationError: there is one."""
        with ExitStack() as stack:
            with self.lock:
                self.refuse_while_running(doing)
                if self.is_connecting:
                    raise MigrationError("a migration is connecting")
                stack.enter_context(self._snapshots.claim())
            yield

    # -- a migration, from its beginning to its end ---------------------------

    def begin(self) -> Report:
        """The report of a new one, which is in set-up. With the lock, behind :meth:`clear`."""
        self.report = Report(self._emit)
        self.report.advance(StatusInput.START)
        return self.report

    def watch_pressure(self, report: Report) -> None:
        """On this host's memory, until the migration ends."""
        self._pressure = PressureWatch(report.warn)
        self.when_cleared(self._stop_watching)

    def pressure(self) -> dict[str, object] | None:
        """See :meth:`PressureWatch.figures`; None: nobody watches. With the lock."""
        return None if self._pressure is None else self._pressure.figures()

    def start(self, run: Callable[[], None], name: str) -> None:
        """The migration's thread; the one before it has ended."""
        self._thread = NamedThread(target=run, name=name, daemon=True)
        self._thread.start()

    def when_cleared(self, free: Callable[[], None]) -> None:
        """To be called once the migration has ended, before the next one; last in, first out."""
        self._left.callback(free)

    def clear(self) -> None:
        """Free what the last migration left; it has ended."""
        self.join()
        with self.lock:
            left, self._left = self._left, ExitStack()
        left.close()

    def join(self) -> None:
        """Until the migration's thread has ended."""
        if self._thread is not None:
            self._thread.join()

    def wait(self, timeout_s: float | None) -> Status:
        """See :meth:`MigrationService.wait`."""
        with self.lock:
            report, thread = self.report, self._thread
        if report is None:
            return Status.NONE
        until = None if timeout_s is None else time.monotonic() + timeout_s
        status = report.wait_for(SETTLED, timeout_s)
        if status in RESTING and thread is not None:
            thread.join(None if until is None else max(0.0, until - time.monotonic()))
        return status

    def _stop_watching(self) -> None:
        with self.lock:
            pressure, self._pressure = self._pressure, None
        if pressure is not None:
            pressure.close()

    def _emit(self, event: str, data: dict[str, object]) -> None:
        if event == "MIGRATION" and data.get("status") in _ENDED and self._pressure is not None:
            self._pressure.freeze()
        self._listeners.emit(event, data)
