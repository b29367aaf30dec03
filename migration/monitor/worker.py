"""The threads commands run on."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable


class SerialWorker:
    """A thread that runs one thing after the other, started at the first.

    Commands run here, never on the loop's thread: one that waits (inside the machine, for a page)
    holds up its own client only. The thread is a daemon: a command asleep on a page that never
    comes must not keep the process from ending.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_stopped = False

    @property
    def has_ended(self) -> bool:
        """Stopped, and no longer inside anything."""
        return self._is_stopped and (self._thread is None or not self._thread.is_alive())

    def submit(self, work: Callable[[], None]) -> None:
        """Run ``work`` after everything submitted before."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()
        self._queue.put(work)

    def stop(self) -> None:
        """End after what was submitted so far; does not wait."""
        self._is_stopped = True
        self._queue.put(None)

    def join(self, timeout_s: float) -> bool:
        """Wait for the end; False when the thread is still inside a command."""
        if self._thread is not None:
            self._thread.join(timeout_s)
            return not self._thread.is_alive()
        return True

    def _run(self) -> None:
        while (work := self._queue.get()) is not None:
            work()
