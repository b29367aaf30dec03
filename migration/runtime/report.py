"""Who hears what happens: the status machine with its listeners, and the clocks of one
migration."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from migration.engine.states import STATUS, StateMachine, Status, StatusInput

EventListener = Callable[[str, dict[str, object]], None]

SETTLED = frozenset({Status.COMPLETED, Status.FAILED, Status.CANCELLED, Status.POSTCOPY_PAUSED})
"""Statuses a migration does not leave by itself."""


class Listeners:
    """Who is told of every event, in the order they came. Any thread."""

    def __init__(self) -> None:
        self._callbacks: list[EventListener] = []

    def add(self, callback: EventListener) -> None:
        """From the next event on."""
        self._callbacks.append(callback)

    def emit(self, event: str, data: dict[str, object]) -> None:
        """Tell them, in the calling thread."""
        for callback in list(self._callbacks):
            callback(event, data)


class Report:
    """Status, times and error of one migration, safe from any thread.

    :ivar error: text of what went wrong, for ``error-desc``.
    :ivar recoveries: how often the migration went on over a new connection that stood.
    :ivar warnings: sentences for the user, in the order they came; only ever appended to.
    """

    def __init__(self, emit: EventListener, start: Status = Status.NONE) -> None:
        self._machine: StateMachine[Status, StatusInput] = StateMachine(STATUS, start)
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._emit = emit
        self._untold = 0  # changes of status the listeners have not heard of yet
        self.error: str | None = None
        self.recoveries = 0
        self.warnings: list[str] = []
        self.started_ns = time.monotonic_ns()
        self.setup_done_ns: int | None = None
        self.guest_stopped_ns: int | None = None
        self.guest_moved_ns: int | None = None
        self.ended_ns: int | None = None

    @property
    def status(self) -> Status:
        return self._machine.state

    def accepts(self, input_: StatusInput) -> bool:
        """Whether the status would move on with this input."""
        with self._lock:
            return self._machine.accepts(input_)

    def advance(self, input_: StatusInput, *, error: str | None = None) -> Status:
        """Move on and tell everybody. :raises StateError: not now; nothing changed."""
        with self._lock:
            status = self._advance(input_, error)
        self._tell(status)
        return status

    def try_advance(self, input_: StatusInput, *, error: str | None = None) -> bool:
        """Like :meth:`advance`, but an input that does not apply has no effect."""
        with self._lock:
            if not self._machine.accepts(input_):
                return False
            status = self._advance(input_, error)
        self._tell(status)
        return True

    def fail(self, error: Exception) -> None:
        """This ended the migration, unless it said itself how it ended: paused is no failure."""
        if self.status not in SETTLED:
            self.try_advance(StatusInput.FAIL, error=str(error) or repr(error))

    def _advance(self, input_: StatusInput, error: str | None) -> Status:
        status = self._machine.advance(input_)
        if error is not None:
            self.error = error
        if status is Status.POSTCOPY_RECOVER:  # not for a wish (-setup) that nobody came for
            self.recoveries += 1
        if status is Status.ACTIVE and self.setup_done_ns is None:
            self.setup_done_ns = time.monotonic_ns()
        if status in (Status.COMPLETED, Status.FAILED, Status.CANCELLED):
            self.ended_ns = time.monotonic_ns()
        self._untold += 1
        return status

    def _tell(self, status: Status) -> None:
        """Listeners first, then whoever waits: after a wait every event has been heard."""
        try:
            self._emit("MIGRATION", {"status": status.value})
        finally:
            with self._lock:
                self._untold -= 1
                self._changed.notify_all()

    def emit(self, event: str, data: dict[str, object]) -> None:
        """Pass on an event that is not a change of status."""
        self._emit(event, data)

    def warn(self, text: str) -> None:
        """Something the user should know, and nothing that ends the migration. Any thread."""
        self.warnings.append(text)
        self._emit("X_WARNING", {"text": text})

    def wait_for(self, statuses: frozenset[Status], timeout_s: float | None) -> Status:
        """Sleep until the status is one of these and every listener has heard of it, or the time is
        over; the status then. Not for listeners: they would wait for themselves."""
        with self._lock:
            self._changed.wait_for(
                lambda: self._machine.state in statuses and not self._untold, timeout_s
            )
            return self._machine.state

    def total_ms(self) -> int:
        """From the start to the end, or to now."""
        return (self._or_now(self.ended_ns) - self.started_ns) // 1_000_000

    def setup_ms(self) -> int:
        return (self._or_now(self.setup_done_ns) - self.started_ns) // 1_000_000

    def downtime_ms(self) -> float | None:
        """How long neither side ran, as the source saw it."""
        if self.guest_stopped_ns is None or self.guest_moved_ns is None:
            return None
        return (self.guest_moved_ns - self.guest_stopped_ns) / 1e6

    @staticmethod
    def _or_now(when: int | None) -> int:
        return time.monotonic_ns() if when is None else when
