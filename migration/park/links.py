"""How a source reaches us again: its preempt channel, and its new channel after a cut.

Both come in where the first connection came in. A QEMU of 7.2 opens the preempt channel at once,
newer ones when postcopy begins; after a cut ``migrate -r`` connects anew.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from migration.runtime.channel import Channel
from migration.runtime.errors import MigrationError
from migration.runtime.transport import Listener, is_multi_channel
from migration.runtime.urgent import UrgentReceiver

LAST_PAGES_TIMEOUT_S = 30.0
_LAST_PAGES_POLL_S = 0.005


class SourceLinks:
    """For one incoming stream. Takes over the listener.

    :param listener: where the first connection came in; None or one of an ``fd:``, ``exec:`` or
        ``file:``: nothing more can come.
    :param give_up_s: how long a cut is waited out; None: until :meth:`interrupt`, 0: not at all.
    """

    def __init__(self, listener: Listener | None, *, give_up_s: float | None) -> None:
        self._give_up_s = give_up_s
        self._lock = threading.Lock()
        self._listener = listener
        self._urgent: UrgentReceiver | None = None
        self._interrupted = False
        if listener is not None and not is_multi_channel(listener.uri):
            listener.close()
            self._listener = None

    @property
    def uri(self) -> str:
        """What the source connects to."""
        return "nowhere" if self._listener is None else self._listener.uri

    @property
    def can_come_back(self) -> bool:
        """Whether a cut may be mended at all."""
        return self._listener is not None and self._give_up_s != 0 and not self._interrupted

    def expect_urgent(
        self, native: object, failed: Callable[[Exception], None], *, is_framed: bool
    ) -> None:
        """Take in a preempt channel whenever one comes; most sources open none."""
        if self._listener is not None:
            self._urgent = UrgentReceiver(native, self._listener, failed)
            self._urgent.start(is_framed=is_framed)

    def await_last_pages(self, missing: Callable[[], int]) -> None:
        """The main channel has ended; pages on the other one may still be on their way."""
        until = time.monotonic() + LAST_PAGES_TIMEOUT_S
        while self._urgent is not None and missing() and time.monotonic() < until:
            if self._urgent.ended.wait(_LAST_PAGES_POLL_S):
                return

    def _stop_urgent(self) -> None:
        if self._urgent is not None:
            self._urgent.stop()
            self._urgent = None

    def accept_again(self) -> Channel:
        """The source's next connection.

        :raises MigrationError: it did not come in time, or :meth:`interrupt` was called.
        """
        assert self._listener is not None
        self._stop_urgent()
        with self._lock:
            # Anew: a wake-up meant for the preempt thread must not end this wait.
            uri = self._listener.uri
            self._listener.close()
            self._listener = Listener(uri)
            if self._interrupted:
                raise MigrationError("interrupted")
        timer = threading.Timer(self._give_up_s or 0, self._listener.wake)
        timer.daemon = True
        if self._give_up_s is not None:
            timer.start()
        try:
            return self._listener.accept()
        finally:
            timer.cancel()

    def interrupt(self) -> None:
        """Any thread: nobody waits for the source any longer."""
        with self._lock:
            self._interrupted = True
            if self._listener is not None:
                self._listener.wake()

    def close(self) -> None:
        """End the preempt thread and stop listening."""
        self._stop_urgent()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
