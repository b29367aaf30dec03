"""Who runs the guest, seen from outside: the operation counters of its vCPUs, in each process's
memory.

Nobody is asked: the counters are read through ``/proc/PID/mem``, and each vCPU counts there what it
did, a native thread or a KVM guest alike. A guest that moved on may never move again where it was:
so the order of the movers must not name anybody twice.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from types import TracebackType

_INTERVAL_S = 0.004


class Heart:
    """The counters of one process's vCPUs."""

    def __init__(self, name: str, pid: int, addresses: Sequence[int]) -> None:
        self.name = name
        self.is_over = False
        self.last: tuple[int, ...] = ()
        self._addresses = tuple(addresses)
        self._fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
        self.last = self.read()

    def read(self) -> tuple[int, ...]:
        """All counters now; those of the last time if the process or its machine is gone."""
        try:
            words = [os.pread(self._fd, 8, address) for address in self._addresses]
        except OSError:
            words = [b""]
        if self.is_over or not all(len(word) == 8 for word in words):
            self.is_over = True
            return self.last
        return tuple(int.from_bytes(word, "little") for word in words)

    def close(self) -> None:
        """Let go of the process."""
        os.close(self._fd)


class Heartbeats:
    """Watches any number of processes, in a thread of its own, until its ``with`` block ends.

    :ivar movers: who ran the guest, in order. :ivar violations: what must never be, in words.
    """

    def __init__(self) -> None:
        self.movers: list[str] = []
        self.violations: list[str] = []
        self._hearts: list[Heart] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="heartbeats")

    def add(self, name: str, pid: int, addresses: Sequence[int]) -> None:
        """Watch one more process."""
        with self._lock:
            self._hearts.append(Heart(name, pid, addresses))

    def forget(self, name: str) -> None:
        """Its machine is about to be taken down, memory and all."""
        with self._lock:
            for heart in self._hearts:
                if heart.name == name:
                    heart.last = heart.read()
                    heart.is_over = True

    def beats(self, name: str) -> int:
        """Operations of all vCPUs of that process, now."""
        with self._lock:
            return sum(next(heart for heart in self._hearts if heart.name == name).read())

    def look(self) -> None:
        """One look at everybody."""
        with self._lock:
            for heart in self._hearts:
                before, heart.last = heart.last, heart.read()
                # From nothing to something is a counter that was loaded; it beats from then on.
                if any(0 < old != new for old, new in zip(before, heart.last, strict=True)):
                    self._moved(heart)

    def _moved(self, heart: Heart) -> None:
        if self.movers and self.movers[-1] == heart.name:
            return
        if heart.name in self.movers:
            self.violations.append(
                f"the guest runs at {heart.name} again after it ran at {self.movers[-1]}"
            )
        self.movers.append(heart.name)
        # What the others did before this one began is no fault, though nobody had looked yet.
        for other in self._hearts:
            if other is not heart:
                other.last = other.read()

    def _watch(self) -> None:
        while not self._stop.wait(_INTERVAL_S):
            self.look()

    def __enter__(self) -> Heartbeats:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self.look()
        for heart in self._hearts:
            heart.close()
