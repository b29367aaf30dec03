"""Slowing the vCPUs down: each is kept from running for its share of every 10 ms."""

from __future__ import annotations

import threading
from collections.abc import Callable

from uffd.threads import NamedThread

PERIOD_S = 0.010


class Throttler:
    """A thread that holds the guest, ``percent`` of the time, from the first non-zero setting on.

    :param hold: keeps every vCPU from running for so many seconds.
    """

    def __init__(self, hold: Callable[[float], None]) -> None:
        self._hold = hold
        self._percent = 0
        self._changed = threading.Event()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def percent(self) -> int:
        """The share of time the vCPUs sleep."""
        return self._percent

    @percent.setter
    def percent(self, value: int) -> None:
        self._percent = value
        self._changed.set()
        if value and self._thread is None:
            self._thread = NamedThread(target=self._run, name="outgoing-throttle", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while not self._stopped.is_set():
            share = self._percent / 100
            if not share:
                self._changed.wait()
                self._changed.clear()
                continue
            # QEMU's proportion: the running slice is 10 ms, the sleep as long as the share asks
            # for.
            self._hold(PERIOD_S * share / (1 - share))
            self._stopped.wait(PERIOD_S)

    def stop(self) -> None:
        """The vCPUs run freely again. Returns when nobody is held any more."""
        self._stopped.set()
        self._percent = 0
        self._changed.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
            self._thread = None
