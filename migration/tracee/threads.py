"""All threads of a process, held still for a moment."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import Self

from . import ptracing
from .errors import TraceeError, TraceeGone


class StoppedThreads:
    """A ``with`` block in which no thread of ``pid`` runs.

    Signals that arrive meanwhile stay pending. A thread inside a system call that cannot be
    interrupted (disk I/O) is waited for. The kernel lets go of all threads if we die.

    :ivar tids: all of them. One thread of ours must do everything with them: ptrace(2) insists.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.tids: list[int] = []

    def __enter__(self) -> Self:
        """:raises TraceeError: not allowed, or somebody else traces it. :raises TraceeGone: it
        ended.
        """
        try:
            while new := sorted(_threads(self.pid) - set(self.tids)):
                # A thread may be born until the last one that could do it stands still.
                for tid in new:
                    self._stop(tid)
        except BaseException:
            self._let_go()
            raise
        if not self.tids:
            raise TraceeGone(f"process {self.pid} has ended")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._let_go()

    def _stop(self, tid: int) -> None:
        try:
            ptracing.seize(tid)
        except TraceeGone:
            return
        self.tids.append(tid)
        try:
            ptracing.interrupt(tid)
            stop = ptracing.wait(tid)
            while not stop.is_interrupt:
                # About to be handed a signal: it takes it, and stops right behind.
                ptracing.resume(tid, stop.signal)
                stop = ptracing.wait(tid)
        except TraceeGone:
            self.tids.remove(tid)

    def _let_go(self) -> None:
        for tid in self.tids:
            try:
                ptracing.detach(tid)
            except TraceeError:
                continue
        self.tids = []


def _threads(pid: int) -> set[int]:
    try:
        return {int(name) for name in os.listdir(Path("/proc") / str(pid) / "task")}
    except FileNotFoundError:
        raise TraceeGone(f"there is no process {pid}") from None
