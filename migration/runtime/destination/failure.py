"""What becomes of an incoming migration when something breaks; whose the guest is by then, the
phase says."""

from __future__ import annotations

import contextlib

from migration.engine.states import Status, StatusInput

from ..errors import MigrationError, is_lost_channel
from ..machine import Machine
from ..report import Report
from .channels import DestinationChannels
from .guest import DestinationGuest
from .phase import DestinationPhase, Loss
from .sensitise import SensitiveRam

RUN_IS_MISSING = (
    "all devices are loaded, but whether the source gave its guest away is not known here: if it "
    "is postcopy-paused there, recover the migration; if it runs there, migrate_cancel or quit here"
)


class DestinationFailure:
    """Each thread tells its own; any of them may be the first."""

    def __init__(
        self,
        machine: Machine,
        channels: DestinationChannels,
        phase: DestinationPhase,
        guest: DestinationGuest,
        memory: SensitiveRam,
        report: Report,
    ) -> None:
        self._machine = machine
        self._channels = channels
        self._phase = phase
        self._guest = guest
        self._memory = memory
        self._report = report

    def main_failed(self, error: Exception) -> None:
        """Main thread: its last act."""
        self._phase.main_fails()
        self._guest.stay_away()
        self._fail(error)

    def multifd_failed(self, error: Exception) -> None:
        """From a channel's thread. The main thread learns of it where it waits for the stream."""
        self._phase.cause(error)
        if not is_lost_channel(error):
            with contextlib.suppress(MigrationError):
                self._channels.shut(1)
        self._channels.main.abort()

    def stream_failed(self, error: Exception) -> None:
        """From LISTEN on. Pauses where the guest is ours, or may be and runs only when RUN comes
        after all. Otherwise it never will, and the main thread may sleep on a page that never
        comes: poison wakes it."""
        loss = self._phase.lose_stream(error)
        if loss is Loss.NOT_OURS:
            self._phase.wake_main()
            self._fail(error)
            with contextlib.suppress(MigrationError):
                self._memory.give_up()
            return
        self._channels.main.abort()
        text = str(error) if loss is Loss.OURS else f"{error}; {RUN_IS_MISSING}"
        self._report.try_advance(StatusInput.LOST_CHANNEL, error=text)

    def _fail(self, error: Exception) -> None:
        if self._report.status is Status.FAILED or self._guest.started.is_set():
            return
        cause = self._phase.cause(error)
        self._machine.run_state = "inmigrate"
        if not is_lost_channel(error):
            self._channels.refuse()
        self._report.try_advance(StatusInput.FAIL, error=cause)
        self._channels.abort()
