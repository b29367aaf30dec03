"""Who has the guest: the one point at which its source gives it away, and what a failure means on
either side of it.

Between our own ends the point is the first byte of RUN, which goes out alone after the package was
acknowledged: the return-path thread sends it natively, and the native object knows it. Against a
stock destination RUN is in the package, so it is the package's first byte; in a precopy it is the
EOF byte. Before the point any failure starts the guest here again; from it on nothing here ever
does, except

* a stock destination that says SHUT non-zero before the package's last PONG, or one of a precopy
  that does so at all: it cannot have run the guest, and
* a person who knows that the guest of a precopy does not run over there
  (:meth:`CommitPoint.take_back`).
"""

from __future__ import annotations

import time

from migration.engine.states import Status, StatusInput
from migration.native import lib

from ..errors import MigrationError, is_lost_channel
from ..machine import Machine
from ..report import Report
from .answers import SourceAnswers
from .channels import SourceChannels
from .control import SourceControl
from .guest import SourceGuest
from .package import PING_PACKAGE
from .ram import SourceRam

LAST_WORD_TIMEOUT_S = 2.0
MAY_BE_NOWHERE = (
    ". The last word of this precopy was lost: if the destination did not get it either, it says "
    "'failed' and never runs the guest; x-take-back then takes it back here"
)


class CommitPoint:
    """Passed or not, asked by any thread; the migration thread tells what goes out."""

    def __init__(
        self,
        machine: Machine,
        guest: SourceGuest,
        ram: SourceRam,
        channels: SourceChannels,
        answers: SourceAnswers,
        control: SourceControl,
        report: Report,
    ) -> None:
        self._machine = machine
        self._guest = guest
        self._ram = ram
        self._channels = channels
        self._answers = answers
        self._control = control
        self._report = report
        self._was_paused = False

    # -- what goes out --------------------------------------------------------

    def eof_goes_out(self) -> None:
        """The EOF byte of a precopy is next, which starts the guest over there. Without a return
        path one that did not go out whole is a failure like any before."""
        self._guest.is_given_away = self._answers.are_heard

    def eof_went_out(self) -> None:
        """And everything behind it."""
        self._guest.is_given_away = True

    def package_goes_out(self, *, with_run: bool) -> None:
        """The package is next.

        :param with_run: a stock destination's. It may still say that it cannot load it.
        """
        self._guest.is_given_away = with_run
        if with_run:
            lib.src_await_loaded(self._ram.native)

    def take_over(self) -> None:
        """Another process gave the guest away."""
        self._guest.is_stopped = self._guest.is_given_away = True

    def goes_on_after_pause(self) -> None:
        """Only a postcopy whose guest was given away pauses: it ran over there."""
        self._was_paused = True

    # -- passed? --------------------------------------------------------------

    @property
    def is_run_sent(self) -> bool:
        """RUN went out alone: the guest is the destination's."""
        return bool(self._ram.native is not None and lib.src_run_sent(self._ram.native))

    def is_passed(self) -> bool:
        """Whether the guest may run at the destination."""
        if self.is_run_sent or self._was_paused:
            return True
        return self._guest.is_given_away and not self._destination_said_no()

    def _destination_said_no(self) -> bool:
        """SHUT non-zero; in postcopy before the package's last PONG: after it the guest ran
        there."""
        if not self._answers.shut:
            return False
        is_precopy = self._report.status is Status.DEVICE
        return is_precopy or not lib.src_has_pong(self._ram.native, PING_PACKAGE)

    def wait_loaded(self) -> bool:
        """Sleep, without the GIL, until a destination that got RUN in its package has loaded its
        devices, or says or does something else; :meth:`is_passed` then."""
        if lib.src_wait_loaded(self._ram.native) < 0:
            self._answers.wait()
        return self.is_passed()

    # -- how it ends ----------------------------------------------------------

    def guest_left(self) -> None:
        """Passed in a postcopy: the clock of the downtime stops. Any number of times."""
        if self._report.guest_moved_ns is None:
            sent = self._ram.statistics()["run_sent_ns"]
            self._report.guest_moved_ns = sent or time.monotonic_ns()
        if self._report.status is Status.POSTCOPY_DEVICE:
            self._report.advance(StatusInput.POSTCOPY)

    def completed(self) -> None:
        """The destination has everything, and said so if it can."""
        self._guest.has_moved()
        self._report.advance(StatusInput.DONE)

    def fail(self, error: Exception) -> None:
        """The migration thread's last act after ``error``: the report says FAILED, CANCELLED or
        POSTCOPY_PAUSED, and the guest goes on here unless it was given away."""
        if is_lost_channel(error):
            # The peer is gone, but its last word (SHUT) may still wait in the socket to be read.
            self._answers.wait(LAST_WORD_TIMEOUT_S)
        # What the return path said before is the cause; what it says of the abort is not.
        cause = self._answers.error or error
        self._channels.abort()
        self._answers.wait()
        text = self._failure_text(cause)
        if self._guest.is_stopped and self.is_passed():
            self._fail_without_guest(text)
            return
        if self._guest.is_stopped:
            self._guest.go_on()
        if self._control.is_cancelled:
            self._report.try_advance(StatusInput.CANCELLED)
        else:
            self._report.try_advance(StatusInput.FAIL, error=text)

    def _fail_without_guest(self, text: str) -> None:
        """In postcopy whatever broke may be mended: paused, unless the destination itself
        failed."""
        self.guest_left()
        kind = StatusInput.FAIL if self._answers.shut else StatusInput.LOST_CHANNEL
        if not self._report.try_advance(kind, error=text):
            self._report.try_advance(StatusInput.FAIL, error=text)

    def _failure_text(self, cause: Exception) -> str:
        shut, is_passed = self._answers.shut, self.is_passed()
        text = self._answers.refusal if shut else self._channels.main.explain(str(cause))
        if is_lost_channel(cause) and not is_passed:
            text += "; if the destination refused the migration, its own error says why"
        if self._guest.is_stopped and is_passed:
            text += "; the guest is the destination's and does not start here again"
            if self._report.status is Status.DEVICE and shut is None:
                text += MAY_BE_NOWHERE
            if self._guest.handed:
                text += (
                    ". Its memory is the destination's too, and still mapped here: end this process"
                )
        return text

    def take_back(self) -> None:
        """The guest of a precopy goes on here after all, see :meth:`OutgoingSide.take_back`.

        :raises MigrationError: it is not known to be nowhere: it never left, or it moved, or this
            is a postcopy, in which a recovery repeats the word that was lost.
        """
        if self._report.status is Status.POSTCOPY_PAUSED:
            raise MigrationError(
                "this is a postcopy: recover it, which says RUN once more if it was lost "
                "(migrate-recover there, migrate with resume here)"
            )
        if self._report.status is not Status.FAILED or not self._guest.is_held:
            raise MigrationError(
                f"there is no guest to take back: the migration is '{self._report.status.value}' "
                f"and the guest '{self._machine.run_state}' here"
            )
        if self._answers.shut is not None or self.is_run_sent:
            raise MigrationError("the guest ran at the destination: it cannot be taken back")
        self._report.guest_moved_ns = None
        self._report.error = f"{self._report.error}; taken back by x-take-back"
        self._guest.go_on()
