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
import select
import signal
import sys
import time
from typing import BinaryIO

from uffd import (
    Event,
    Feature,
    Fork,
    Mode,
    NotPermitted,
    UffdError,
    Userfaultfd,
    pidfd_getfd,
    pidfd_open,
)
from uffd.opening import handshake

from . import changes
from .calls import borrow, stub_addresses
from .errors import TraceeError, TraceeGone
from .mappings import ProcessMapping, mappings
from .memory import populated, read_memory, userfaultfds
from .plan import Plan
from .ptracing import registers
from .threads import StoppedThreads

_RETRY_S = 0.001


class Keeper:
    """See the module. :ivar plan: what is being done."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._uffd: Userfaultfd | None = None
        self._children: list[Userfaultfd] = []

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
        self._uffd = Userfaultfd.from_fd(mine)

    def guard(self) -> None:
        """Register the place."""
        assert self._uffd is not None
        self._uffd.register(self.plan.start, self.plan.length, Mode.MISSING)

    def finish(self) -> None:
        """Everything is in its place."""
        if self._uffd is None:
            return
        uffd, self._uffd = self._uffd, None
        uffd.wake(self.plan.start, self.plan.length)
        uffd.close()

    # -- alone ------------------------------------------------------------------

    def recover(self) -> str:
        """The tracer is dead: ``finished``, ``undone``, or ``gone`` with the process.

        Tries for as long as it takes: to give up would show zeros to whoever waits at the place.
        """
        while True:
            try:
                self._read_events()
                with StoppedThreads(self.plan.pid) as stopped:
                    if not self._is_under_way(stopped):
                        return self._settle(stopped)
            except TraceeGone:
                return "gone"
            except TraceeError:
                # A dying process closes its descriptors before it lets go of whom it traces; and
                # a thread may stand where it cannot be borrowed for now.
                pass
            time.sleep(_RETRY_S)

    def _is_under_way(self, stopped: StoppedThreads) -> bool:
        """Is the borrowed thread still on the way our dead friend sent it?"""
        if self.plan.tid not in stopped.tids:
            return False
        low, high = stub_addresses(self.plan.pid)
        at = int(registers(self.plan.tid).rip)
        return any(start <= at < end for start, end in (low, high))

    def _settle(self, stopped: StoppedThreads) -> str:
        plan = self.plan
        maps = mappings(plan.pid)
        with borrow(plan.pid, stopped.tids) as thread:
            is_in = _is_hugetlb(maps, plan.start)
            if not is_in and _is_writable(maps, plan.aside):
                self._fill_children()
                changes.move_back(thread, plan)
            elif not is_in and self._uffd is not None:
                self._uffd.unregister(plan.start, plan.length)
            else:
                self._fill_children()
            for address in (plan.fresh, plan.aside):
                changes.unmap(thread, address, plan)
            for fd in set(userfaultfds(plan.pid)) - set(plan.uffds):
                changes.close(thread, fd)
        self.finish()
        return "finished" if is_in else "undone"

    def _read_events(self) -> None:
        """A fork waits until it is noticed, and cannot be stopped while it waits."""
        while self._uffd is not None and select.select([self._uffd], [], [], 0)[0]:
            for event in self._uffd.read_events():
                self._note(event)

    def _note(self, event: Event) -> None:
        if isinstance(event, Fork):
            self._children.append(event.child)

    def _fill_children(self) -> None:
        """A child has the old pages aside as we have; its empty place gets a copy of them."""
        plan = self.plan
        for child in self._children:
            for offset, length in populated(plan.pid, plan.aside, plan.length):
                child.copy(plan.start + offset, read_memory(plan.pid, plan.aside + offset, length))
            child.close()
        self._children = []


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
