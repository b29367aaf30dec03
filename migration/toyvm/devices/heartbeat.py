"""The guest's virtual clock and a periodic timer on it.

The clock counts nanoseconds the guest ran: it stands still while the guest is stopped, and a
migration continues it. The timer's beats are counted, and the count tells whether time was lost or
invented.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from migration.wire.vmstate import I64, U64, Timer, Validate, VMStateDescription

PERIOD_NS = 100_000_000


class Heartbeat:
    """:ivar beats: how often the timer expired. :ivar expiry_ns: when it will next; None: not
    armed."""

    def __init__(self, now_ns: Callable[[], int] = time.monotonic_ns) -> None:
        """:param now_ns: the host's clock."""
        self._now_ns = now_ns
        self._running_since: int | None = None
        self.clock_ns = 0
        self.beats = 0
        self.period_ns = PERIOD_NS
        self.expiry_ns: int | None = None

    def go(self) -> None:
        """The guest runs: so does its clock."""
        if self._running_since is None:
            self._running_since = self._now_ns()
            if self.expiry_ns is None:
                self.expiry_ns = self.clock_ns + self.period_ns

    def halt(self) -> None:
        """The guest stands still."""
        self.catch_up()
        self._running_since = None

    def catch_up(self) -> None:
        """Count the beats that came due. Callers hold the machine's lock."""
        if self._running_since is not None:
            now = self._now_ns()
            self.clock_ns += now - self._running_since
            self._running_since = now
        if self.expiry_ns is not None and self.clock_ns >= self.expiry_ns:
            due = (self.clock_ns - self.expiry_ns) // self.period_ns + 1
            self.beats += due
            self.expiry_ns += due * self.period_ns


def _is_consistent(heartbeat: Heartbeat, version_id: int) -> bool:
    if heartbeat.clock_ns < 0 or heartbeat.period_ns <= 0:
        return False
    return heartbeat.expiry_ns is None or (
        heartbeat.expiry_ns == (heartbeat.beats + 1) * heartbeat.period_ns
    )


HEARTBEAT = VMStateDescription(
    name="toy-heartbeat",
    version_id=1,
    minimum_version_id=1,
    pre_save=Heartbeat.catch_up,
    fields=(
        I64("clock_ns"),
        U64("beats"),
        I64("period_ns"),
        Timer("expiry_ns"),
        Validate("beats fit the clock", _is_consistent),
    ),
)
