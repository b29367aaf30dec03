"""How a source reaches us again: its preempt channel, and its new channel after a cut.

Both come in where the first connection came in, at any time: a QEMU of 7.2 opens the preempt
channel at once, newer ones when postcopy begins, and after a cut ``migrate -r`` connects anew,
maybe before we have noticed the cut. Their first byte tells them apart: a main channel that resumes
begins with a command, a preempt channel with the (small) offset of a page. So a connection is
sorted when its first byte is there; a preempt channel that carries nothing never is, and need not.

The listening socket stays the same throughout: a QEMU of 7.2 whose resumed connection is refused
half-way hangs.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from typing import cast

from migration.runtime.channel import Channel
from migration.runtime.destination.urgent import UrgentReceiver
from migration.runtime.errors import MigrationError
from migration.runtime.transport import Listener, is_multi_channel
from migration.wire.constants import SectionType
from migration.wire.errors import StreamError

LAST_PAGES_TIMEOUT_S = 30.0
_LAST_PAGES_POLL_S = 0.005


class _Door:
    """Connections of one kind, to be taken one by one; the part of a :class:`Listener` that
    :class:`UrgentReceiver` uses."""

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[Channel | None] = queue.SimpleQueue()

    def bring(self, channel: Channel) -> None:
        self._queue.put(channel)

    def accept(self, timeout_s: float | None = None) -> Channel:
        """:raises MigrationError: :meth:`wake` was called, or the time is over."""
        try:
            channel = self._queue.get(timeout=timeout_s)
        except queue.Empty:
            channel = None
        if channel is None:
            raise MigrationError("the source did not come back")
        return channel

    def wake(self) -> None:
        self._queue.put(None)

    def close(self) -> None:
        """Forget wake-ups, close what nobody took."""
        while True:
            try:
                channel = self._queue.get_nowait()
            except queue.Empty:
                return
            if channel is not None:
                channel.close()


class SourceLinks:
    """For one incoming stream. Takes over the listener.

    :param listener: where the first connection came in; None or one of an ``fd:``, ``exec:`` or
        ``file:``: nothing more can come.
    :param give_up_s: how long a cut is waited out; None: until :meth:`interrupt`, 0: not at all.
    """

    def __init__(self, listener: Listener | None, *, give_up_s: float | None) -> None:
        self._give_up_s = give_up_s
        self._listener = listener
        self._main, self._preempt = _Door(), _Door()
        self._lock = threading.Lock()
        self._undecided: set[Channel] = set()
        self._threads: list[threading.Thread] = []
        self._is_framed = False
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

    # -- sorting ----------------------------------------------------------------

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, name="incoming-links", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept_all(self, listener: Listener) -> None:
        while True:
            try:
                channel = listener.accept()
            except MigrationError:
                return
            with self._lock:
                if self._interrupted:
                    channel.close()
                    return
                self._undecided.add(channel)
                self._start(self._sort, channel)

    def _sort(self, channel: Channel) -> None:
        if self._is_framed:
            channel.set_read_framed()
        try:
            head = channel.peek(1)
        except (MigrationError, StreamError):
            head = b""
        with self._lock:
            self._undecided.discard(channel)
            if not head or self._interrupted:
                channel.close()
            elif head[0] == SectionType.COMMAND:
                self._main.bring(channel)
            else:
                self._preempt.bring(channel)

    # -- the preempt channel ----------------------------------------------------

    def expect_urgent(
        self, native: object, failed: Callable[[Exception], None], *, is_framed: bool
    ) -> None:
        """Take in a preempt channel whenever one comes; most sources open none.

        :param is_framed: every connection from now on is, from its first byte.
        """
        if self._listener is None:
            return
        self._is_framed = is_framed
        if not self._threads:
            self._start(self._accept_all, self._listener)
        self._stop_urgent()
        # Sorting has set the framing already.
        self._urgent = UrgentReceiver(native, cast(Listener, self._preempt), failed)
        self._urgent.start(is_framed=False)

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
            self._preempt.close()

    # -- the main channel ---------------------------------------------------------

    def accept_again(self) -> Channel:
        """The source's next main channel; its reading side is framed already when it is to be.

        :raises MigrationError: it did not come in time, or :meth:`interrupt` was called.
        """
        self._stop_urgent()
        return self._main.accept(self._give_up_s)

    def interrupt(self) -> None:
        """Any thread: nobody waits for the source any longer."""
        with self._lock:
            self._interrupted = True
            for channel in self._undecided:
                channel.abort()
        self._main.wake()

    def close(self) -> None:
        """End the preempt thread and stop listening."""
        self.interrupt()
        self._stop_urgent()
        if self._listener is None:
            return
        self._listener.wake()
        while self._threads:
            self._threads.pop().join()
        self._listener.close()
        self._listener = None
        self._main.close()
        self._preempt.close()
