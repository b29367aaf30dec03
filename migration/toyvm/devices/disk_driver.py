"""The guest's disk driver: a thread that rewrites chunks while the guest runs."""

from __future__ import annotations

import random
import threading

from uffd.threads import NamedThread

from ..vcpu import JOIN_TIMEOUT_S
from .disk import Disk, DiskError

PERIOD_S = 0.01


class DiskDriver:
    """One chunk each :data:`PERIOD_S`. It touches no guest RAM, so it never sleeps on a page."""

    def __init__(self, disk: Disk, *, seed: int) -> None:
        self.disk = disk
        self.error: DiskError | None = None
        self._random = random.Random(seed)
        self._changed = threading.Condition()
        self._runs = False
        self._ends = False
        self._thread = NamedThread(target=self._serve, name="disk driver", daemon=True)
        self._thread.start()

    def go(self) -> None:
        """Write from now on."""
        self._set(runs=True, ends=False)

    def halt(self) -> None:
        """Returns when it does not."""
        self._set(runs=False, ends=False)

    def _set(self, *, runs: bool, ends: bool) -> None:
        # The lock is held during a rewrite, so nothing is in flight once we have it.
        with self._changed:
            self._runs, self._ends = runs, ends
            self._changed.notify()

    def _serve(self) -> None:
        with self._changed:
            while not self._ends:
                self._changed.wait(PERIOD_S if self._runs else None)
                if self._runs and not self.error:
                    self._rewrite()

    def _rewrite(self) -> None:
        try:
            self.disk.rewrite(self._random.randrange(self.disk.chunk_count))
        except DiskError as error:
            self.error = error

    def close(self) -> None:
        """End the thread and join it. Harmless the second time."""
        self._set(runs=False, ends=True)
        self._thread.join(JOIN_TIMEOUT_S)
