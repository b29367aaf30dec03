"""The preempt channel on the destination: a second connection for the pages that were asked for.

It comes when the source likes: at once (QEMU 7.2) or when postcopy begins (8.0 and newer), and
again after a recovery. Its pages are placed by a native loop of its own, so they never wait behind
background pages.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from migration.native import lib
from uffd.threads import NamedThread

from ..channel import Channel
from ..errors import MigrationError, native_error
from ..transport import Listener
from .gather import is_multifd


class UrgentReceiver:
    """The preempt thread of one incoming migration: waits for the connection, then places its
    pages.

    :param listener: where the connection comes in.
    :param failed: called from the preempt thread when the channel broke or brought bad bytes.
    """

    def __init__(
        self,
        native: object,
        listener: Listener,
        failed: Callable[[Exception], None],
    ) -> None:
        self._native = native
        self._listener = listener
        self._failed = failed
        self._lock = threading.Lock()
        self._channel: Channel | None = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._early: list[Channel] = []  # came before it was waited for
        self.ended = threading.Event()

    def start(self, *, is_framed: bool) -> None:
        """Wait for the connection in a new thread; of an earlier one nothing may be left
        running."""
        self.ended.clear()
        self._stopping = False
        self._thread = NamedThread(
            target=self._run, args=(is_framed,), name="incoming-preempt", daemon=True
        )
        self._thread.start()

    def _run(self, is_framed: bool) -> None:
        try:
            channel = self._early.pop(0) if self._early else self._listener.accept()
        except MigrationError:
            self.ended.set()
            return
        with self._lock:
            self._channel = channel
            if self._stopping:
                channel.abort()
        if is_framed:
            channel.set_read_framed()
        lib.dst_set_urgent_channel(self._native, channel.native)
        result = lib.dst_urgent_loop(self._native)
        self.ended.set()
        if result < 0 and not self._stopping:
            error = self._native.urgent.error  # type: ignore[attr-defined]
            self._failed(native_error(error, fallback="preempt channel"))

    def refuse_multifd(self) -> None:
        """A source with more multifd channels than we have: of what it sent over the others nothing
        would ever come, and it would wait for that. Not while running.

        :raises MigrationError: such a channel waits to be let in.
        """
        while (further := self._listener.wait(timeout_s=0)) is not None:
            self._early.append(further)
        if any(is_multifd(early) for early in self._early):
            raise MigrationError(
                "the source has more multifd channels than this end: multifd-channels must be the "
                "same at both"
            )

    def move_to(self, listener: Listener) -> None:
        """Another place to wait at (a recovery's). The old one is closed. Not while running."""
        self._listener.close()
        self._listener = listener

    def close(self) -> None:
        """:meth:`stop`, and close the listener."""
        self.stop()
        for channel in self._early:
            channel.close()
        self._listener.close()

    def stop(self) -> None:
        """End the thread and close the channel; also from the preempt thread itself."""
        with self._lock:
            self._stopping = True
            if self._channel is not None:
                self._channel.abort()
        self._listener.wake()
        if self._thread is None or self._thread is threading.current_thread():
            return
        self._thread.join()
        self._thread = None
        if self._channel is not None:
            self._channel.close()
            self._channel = None
