"""The process that sees a replacement through when the one that began it dies.

It holds a userfaultfd of the other process on the place that is being replaced. While the old pages
are aside and the new ones not in place, whoever touches the place sleeps: nobody reads zeros there
and no write is lost, whatever becomes of the tracer. When it has died the keeper finds out how far
it came, finishes or undoes that, and wakes the sleepers.

Spoken to by lines on standard input: the :class:`~.plan.Plan`, ``take FD``, ``guard``, ``done`` or
``undone``; each is answered by ``ok`` or ``error ...``. The end of the input without a last word
means that the tracer has died.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from contextlib import ExitStack
from typing import BinaryIO

from uffd import Feature, Mode, NotPermitted, UffdError, Userfaultfd, pidfd_getfd, pidfd_open
from uffd.opening import handshake

from . import changes
from .calls import borrow, stub_addresses
from .errors import TraceeError, TraceeGone
from .forks import Forks
from .mappings import ProcessMapping, mappings
from .memory import userfaultfds
from .plan import Plan
from .ptracing import registers
from .threads import StoppedThreads

_RETRY_S = 0.001


class Keeper:
    """See the module.

    :ivar plan: what is being done. :ivar uffd: the other process's, while the place is watched.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.uffd: Userfaultfd | None = None
        self._stubs: tuple[tuple[int, int], ...] = ()

    def take(self, fd: int) -> None:
        """Get the userfaultfd that the other process has as ``fd``."""
        pidfd = pidfd_open(self.plan.pid)
        try:
            mine = pidfd_getfd(pidfd, fd)
        finally:
            os.close(pidfd)
        try:
            # A child forked while the place is empty must be filled as well; needs CAP_SYS_PTRACE.
            handshake(mine, Feature.EVENT_FORK)
        except NotPermitted:
            handshake(mine, Feature.NONE)
        self.uffd = Userfaultfd.from_fd(mine)

    def guard(self) -> None:
        """Register the place."""
        assert self.uffd is not None
        self.uffd.register(self.plan.start, self.plan.length, Mode.MISSING)

    def finish(self) -> None:
        """Everything is in its place."""
        if self.uffd is None:
            return
        uffd, self.uffd = self.uffd, None
        uffd.wake(self.plan.start, self.plan.length)
        uffd.close()

    # -- alone ------------------------------------------------------------------

    def recover(self) -> str:
        """The tracer is dead: ``finished``, ``undone``, or ``gone`` with the process.

        Tries for as long as it takes: to give up would show zeros to whoever waits at the place.
        """
        while True:
            try:
                if result := self._try_to_recover():
                    self.finish()
                    return result
            except TraceeGone:
                return "gone"
            except (TraceeError, UffdError):
                # A dying process closes its descriptors before it lets go of whom it traces; and
                # a thread may stand where it cannot be borrowed for now.
                pass
            time.sleep(_RETRY_S)

    def _try_to_recover(self) -> str | None:
        """What :meth:`recover` returns; ``None``: not yet."""
        with ExitStack() as noticed, ExitStack() as still:
            if self.uffd is not None:
                noticed.enter_context(Forks(self.uffd, self.plan))
            stopped = still.enter_context(StoppedThreads(self.plan.pid))
            noticed.close()  # nobody can fork now, and every child has its pages
            return None if self._is_under_way(stopped) else self._settle(stopped)

    def _is_under_way(self, stopped: StoppedThreads) -> bool:
        """Is the borrowed thread still on the way our dead friend sent it?"""
        if self.plan.tid not in stopped.tids:
            return False
        self._stubs = self._stubs or stub_addresses(self.plan.pid)
        at = int(registers(self.plan.tid).rip)
        return any(start <= at < end for start, end in self._stubs)

    def _settle(self, stopped: StoppedThreads) -> str:
        plan = self.plan
        maps = mappings(plan.pid)
        with borrow(plan.pid, stopped.tids) as thread:
            is_in = _is_hugetlb(maps, plan.start)
            if not is_in and _is_writable(maps, plan.aside):
                changes.move_back(thread, plan)
            elif not is_in and self.uffd is not None:
                self.uffd.unregister(plan.start, plan.length)
            for address in (plan.fresh, plan.aside):
                changes.unmap(thread, address, plan)
            for fd in set(userfaultfds(plan.pid)) - set(plan.uffds):
                changes.close(thread, fd)
        return "finished" if is_in else "undone"


def _is_hugetlb(maps: list[ProcessMapping], address: int) -> bool:
    return any(m.start <= address < m.end and m.is_hugetlb for m in maps)


def _is_writable(maps: list[ProcessMapping], address: int) -> bool:
    return any(m.start <= address < m.end and "w" in m.permissions for m in maps)


def serve(lines: BinaryIO, answers: BinaryIO) -> int:
    """Follow the tracer's words to the end; see the module."""
    keeper: Keeper | None = None
    for line in lines:
        word, _, rest = line.strip().partition(b" ")
        try:
            if word in (b"done", b"undone") and keeper is not None:
                keeper.finish()
                _answer(answers, "ok")
                return 0
            if word == b"take" and keeper is not None:
                keeper.take(int(rest))
            elif word == b"guard" and keeper is not None:
                keeper.guard()
            else:
                keeper = Keeper(Plan.decode(line))
            _answer(answers, "ok")
        except (UffdError, TraceeError, OSError, ValueError) as error:
            _answer(answers, f"error {error}")
    if keeper is not None:
        print(f"keeper of process {keeper.plan.pid}: {keeper.recover()}", file=sys.stderr)
    return 0


def _answer(answers: BinaryIO, text: str) -> None:
    try:
        answers.write(text.encode() + b"\n")
        answers.flush()
    except BrokenPipeError:
        pass  # nobody is left to hear it; the end of the input comes next


def main() -> int:
    """Run until the replacement is over one way or the other."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    return serve(sys.stdin.buffer, sys.stdout.buffer)


if __name__ == "__main__":
    sys.exit(main())
