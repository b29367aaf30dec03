"""The guest as its destination gets it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence

from guestmem import RAMBlock

from ..handover import let_go
from ..machine import Machine
from ..report import Report


class DestinationGuest:
    """Started once, by RUN or at the end of a precopy.

    :ivar started: it was (or waits for ``cont``).
    :ivar taken: RAM whose memory is the source's, handed over by descriptor.
    """

    def __init__(self, machine: Machine, report: Report, *, start_paused: bool) -> None:
        self.started = threading.Event()
        self.taken: Sequence[RAMBlock] = ()
        self._machine = machine
        self._report = report
        self._start_paused = start_paused

    def start(self, *, honour_run_state: bool) -> None:
        """RUN starts the guest whatever state was sent; after a precopy that state decides."""
        self._end_live_state()
        wanted = (self._machine.incoming_run_state if honour_run_state else None) or "running"
        if wanted != "running" or self._start_paused:
            self._machine.run_state = "paused" if wanted == "running" else wanted
        else:
            self._machine.start()
            self._report.emit("RESUME", {})
        self.started.set()

    def stay_away(self) -> None:
        """The main thread failed: unless it started it before, the guest is the source's."""
        self._end_live_state()
        if not self.started.is_set():
            let_go(self.taken)  # before anybody hears of it and empties this RAM

    def _end_live_state(self) -> None:
        """All live state but RAM comes before the guest runs here, or never."""
        with contextlib.suppress(Exception):
            self._machine.registry.load_live_cleanup()
