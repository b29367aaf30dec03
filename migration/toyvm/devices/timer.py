"""The guest's virtual clock, and a periodic timer on it.

The clock counts nanoseconds the guest ran: it stands still while the guest is stopped, and a
migration continues it (QEMU's ``timer`` section). The timer's beats are counted, and the count
tells whether time was lost or invented.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from migration.wire.vmstate import I64, U64, Timer, Validate, VMStateDescription

PERIOD_NS = 100_000_000


class GuestClock:
    """Register it with :data:`migration.wire.timer.TIMER`. Callers hold the machine's lock.

    :ivar cpu_ticks_offset: carried along as received; the toy guest has no tick counter to set.
    """

    def __init__(self, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """:param now_ns: the host's clock."""
        self._now_ns = now_ns
        self._running_since: int | None = None
        self._elapsed_ns = 0
        self.cpu_ticks_offset = 0

    def go(self) -> None:
        """The guest runs: so does its clock."""
        if self._running_since is None:
            self._running_since = self._now_ns()

    def halt(self) -> None:
        """The guest stands still."""
        self._elapsed_ns = self.now_ns()
        self._running_since = None

    def now_ns(self) -> int:
        """Guest time."""
        if self._running_since is None:
            return self._elapsed_ns
        return self._elapsed_ns + self._now_ns() - self._running_since

    @property
    def cpu_clock_offset(self) -> int:
        """The wire's name; while the guest stands still it is the clock itself."""
        return self.now_ns()

    @cpu_clock_offset.setter
    def cpu_clock_offset(self, value: int) -> None:
        self._elapsed_ns = value


class Heartbeat:
    """A periodic timer, due at every multiple of its period from the guest's birth on.

    :ivar beats: how often it expired. :ivar expiry_ns: when it will next; ``None``: not armed.
    """

    def __init__(self, clock: GuestClock) -> None:
        self._clock = clock
        self.beats = 0
        self.period_ns = PERIOD_NS
        self.expiry_ns: int | None = None

    def arm(self) -> None:
        """The guest's first act."""
        if self.expiry_ns is None:
            self.expiry_ns = self.period_ns

    def catch_up(self) -> None:
        """Count the beats that came due."""
        now = self._clock.now_ns()
        if self.expiry_ns is not None and now >= self.expiry_ns:
            due = (now - self.expiry_ns) // self.period_ns + 1
            self.beats += due
            self.expiry_ns += due * self.period_ns


def _is_consistent(heartbeat: Heartbeat, version_id: int) -> bool:
    if heartbeat.expiry_ns is None:
        return heartbeat.beats == 0
    return heartbeat.expiry_ns == (heartbeat.beats + 1) * heartbeat.period_ns


HEARTBEAT = VMStateDescription(
    name="toy-heartbeat",
    version_id=1,
    minimum_version_id=1,
    pre_save=Heartbeat.catch_up,
    fields=(
        U64("beats"),
        I64("period_ns"),
        Validate("period", lambda heartbeat, version_id: heartbeat.period_ns > 0),
        Timer("expiry_ns"),
        Validate("beats fit the expiry", _is_consistent),
    ),
)
