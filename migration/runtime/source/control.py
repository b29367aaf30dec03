"""What others want of an outgoing migration while its thread is at work."""

from __future__ import annotations

import threading


class SourceControl:
    """Wishes of any thread, and the waits of the migration thread that they end.

    :ivar wake: ends the wait for the rate limit, or for what the guest writes.
    """

    def __init__(self) -> None:
        self.wake = threading.Event()
        self._postcopy_wanted = threading.Event()
        self._cancelled = threading.Event()
        self._continued = threading.Event()

    def want_postcopy(self) -> None:
        """From the next round on."""
        self._postcopy_wanted.set()
        self.wake.set()

    @property
    def is_postcopy_wanted(self) -> bool:
        """:meth:`want_postcopy` was called."""
        return self._postcopy_wanted.is_set()

    def cancel(self) -> None:
        """Nobody wants this migration any more."""
        self._cancelled.set()
        self.wait_no_longer()

    @property
    def is_cancelled(self) -> bool:
        """:meth:`cancel` was called."""
        return self._cancelled.is_set()

    def continue_(self) -> None:
        """Go on from the pause before the switchover."""
        self._continued.set()

    def await_continue(self) -> None:
        """The pause before the switchover."""
        self._continued.wait()

    def wait_no_longer(self) -> None:
        """Whatever is waited for, there is something to look at: the migration is over."""
        self._continued.set()
        self.wake.set()
