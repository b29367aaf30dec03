"""The guest as its source holds it."""

from __future__ import annotations

import time
from collections.abc import Sequence

from guestmem import RAMBlock

from ..handover import let_go
from ..machine import Machine
from ..report import Report


class SourceGuest:
    """Stopped for the switchover; where it stays, it goes on as it stood before.

    The migration thread's, but for :meth:`go_on`, which a person may ask for after the end.

    :ivar is_stopped: :meth:`stop` was called. :ivar is_given_away: the destination may have what it
        takes to start it; what follows from that is :class:`~.commit.CommitPoint`'s.
    :ivar handed: RAM whose descriptors went to the destination instead of its pages.
    """

    def __init__(self, machine: Machine, report: Report) -> None:
        self.is_stopped = False
        self.is_given_away = False
        self.handed: Sequence[RAMBlock] = ()
        self._machine = machine
        self._report = report
        self._was_running = False
        self._state_before = machine.run_state

    @property
    def is_running(self) -> bool:
        """Here, that is."""
        return self._machine.run_state == "running"

    @property
    def is_held(self) -> bool:
        """Given away, and never said to have arrived."""
        return self.is_given_away and self._machine.run_state == "finish-migrate"

    def stop(self) -> None:
        """No vCPU runs when it returns; the state it was in travels."""
        self._report.guest_stopped_ns = time.monotonic_ns()
        self._state_before = self._machine.run_state
        self._was_running = self.is_running
        self._machine.note_run_state(self._state_before)
        self.is_stopped = True
        if self._was_running:
            self._machine.stop()
            self._report.emit("STOP", {})
        self._machine.run_state = "finish-migrate"

    def go_on(self) -> None:
        """It stays."""
        self.is_given_away = False
        self._machine.run_state = self._state_before
        if self._was_running:
            self._machine.start()
            self._report.emit("RESUME", {})

    def has_moved(self) -> None:
        """The destination said so."""
        let_go(self.handed)
        self._machine.run_state = "postmigrate"
