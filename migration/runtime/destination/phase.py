"""Where an incoming migration stands, and whose the guest is.

RUN makes it ours. It comes on one thread, the loss of the stream is found on another. One of them
is first, under one lock:

* RUN came: the guest is ours, whatever breaks. Who misses a page waits for a recovery.
* The package was acknowledged to a source that says RUN alone, and the stream was lost before RUN
  came: it may have been on its way. The guest is ours when a recovery repeats it, and only then.
* Before that the source keeps it, and nothing here ever runs it.
"""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from enum import Enum

from migration.engine.states import (
    INCOMING,
    Incoming,
    IncomingInput,
    StateError,
    StateMachine,
    Status,
)
from migration.wire.errors import RemoteStreamError

from ..errors import MigrationError
from ..report import Report


class Loss(Enum):
    """Of the stream: what it means for the guest."""

    OURS = "ours"
    MAY_BE_OURS = "may be ours"
    NOT_OURS = "not ours"


class DestinationPhase:
    """Any thread. Takes no other lock while it holds its own.

    :param explain: an error's text, with what the channel knows of its cause.
    :ivar run_fd: eventfd: RUN came alone; stays readable.
    """

    def __init__(self, report: Report, explain: Callable[[str], str]) -> None:
        self.run_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._fail_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._report = report
        self._explain = explain
        self._lock = threading.Lock()
        self._machine: StateMachine[Incoming, IncomingInput] = StateMachine(INCOMING, Incoming.NONE)
        self._main_failed = threading.Event()
        self._may_be_ours = False  # everything is loaded and acknowledged, only RUN is missing
        self._cause: str | None = None  # of a failure before RUN: the first one

    @property
    def state(self) -> Incoming:
        """The phase."""
        return self._machine.state

    def advance(self, input_: IncomingInput, at: int) -> None:
        """:raises RemoteStreamError: not in this phase."""
        with self._lock:
            self._advance(input_, at)

    def _advance(self, input_: IncomingInput, at: int) -> None:
        try:
            self._machine.advance(input_)
        except StateError as error:
            raise RemoteStreamError(str(error), offset=at) from None

    # -- RUN ------------------------------------------------------------------

    def note_may_be_ours(self, may_be: bool) -> None:
        """Whether the source has what it needs to say RUN alone."""
        with self._lock:
            self._may_be_ours = may_be

    def run_repeated(self) -> None:
        """RUN came in a recovery; no effect on a guest that runs already."""
        os.eventfd_write(self.run_fd, 1)

    def await_run(self) -> None:
        """Main thread: until RUN comes alone. :raises MigrationError: it never will."""
        ready, _, _ = select.select([self.run_fd, self._fail_fd], [], [])
        if self.run_fd not in ready:
            raise MigrationError("the source gave up before RUN: the guest is still its own")

    def run(self, at: int) -> None:
        """Main thread: the guest is ours.

        :raises MigrationError: the stream was lost before. :raises RemoteStreamError: not now.
        """
        with self._lock:
            if self._main_failed.is_set():
                raise MigrationError("the stream was lost before RUN")
            self._advance(IncomingInput.RUN, at)

    def _has_run_come(self) -> bool:
        if self.state in (Incoming.RUNNING, Incoming.END):
            return True
        ready, _, _ = select.select([self.run_fd], [], [], 0)
        return bool(ready)

    # -- or not ---------------------------------------------------------------

    def lose_stream(self, error: Exception) -> Loss:
        """It broke, or brought bad bytes."""
        with self._lock:
            if self._has_run_come():
                return Loss.OURS
            if self._may_be_ours and not self._main_failed.is_set():
                return Loss.MAY_BE_OURS
            self._main_failed.set()
            self._note_cause(error)
            return Loss.NOT_OURS

    def cancel(self) -> bool:
        """Paused before RUN came, and the user knows that the source kept its guest. False: the
        guest is ours, or there is nothing to give up."""
        with self._lock:
            is_waiting = self._report.status is Status.POSTCOPY_PAUSED and self._may_be_ours
            if not is_waiting or self._has_run_come():
                return False
            self._main_failed.set()
            self._note_cause(MigrationError("cancelled before RUN came"))
            return True

    def main_fails(self) -> None:
        """The main thread will not run the guest any more, unless it does already."""
        self._main_failed.set()

    def wake_main(self) -> None:
        """End :meth:`await_run`."""
        os.eventfd_write(self._fail_fd, 1)

    def cause(self, error: Exception) -> str:
        """Text of the failure that ``error`` is, or follows from."""
        with self._lock:
            return self._note_cause(error)

    def _note_cause(self, error: Exception) -> str:
        """A failure ends main and listen thread one after the other; what the second one says is
        only how it was ended."""
        if self._cause is None:
            self._cause = self._explain(str(error))
        return self._cause

    def close(self) -> None:
        """No thread waits here any more."""
        os.close(self.run_fd)
        os.close(self._fail_fd)
