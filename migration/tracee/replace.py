"""Giving a running process huge pages from the pool in the place of memory it has.

All its threads stand still for the length of the copy (about 1 s for 4 GiB). Nobody ever sees the
place without its contents, whatever becomes of us: see :mod:`.keeper`.
"""

from __future__ import annotations

import mmap
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from guestmem.geometry import align_down, align_up, format_size, is_aligned
from guestmem.pools import why_no_pool

from . import changes
from .calls import BorrowedThread, borrow
from .errors import TraceeError
from .mappings import ProcessMapping, mappings
from .memory import descriptors, populated, read_memory, userfaultfds, write_memory
from .plan import Plan, find_room
from .threads import StoppedThreads

_KEPT_ADVICE = {"dc": mmap.MADV_DONTFORK, "dd": mmap.MADV_DONTDUMP}
_UNMOVABLE = {
    "lo": "is locked in memory",
    "io": "is a device's",
    "pf": "is a device's",
    "um": "is watched by a userfaultfd",
    "uw": "is watched by a userfaultfd",
    "ui": "is watched by a userfaultfd",
    "gd": "is a stack",
}
# The kernel holds pages of these by itself; it would go on with pages that are no longer there.
_PINNING = ("anon_inode:[io_uring]",)


@dataclass(frozen=True, slots=True)
class Replacement:
    """What was done. Bytes, and milliseconds in which the process stood still."""

    start: int
    length: int
    page_size: int
    copied: int
    stopped_ms: float


def replace_with_hugepages(pid: int, start: int, length: int, page_size: int) -> Replacement:
    """Put huge pages of ``page_size`` bytes behind ``[start, start + length)`` of a process.

    What it must not do afterwards: unmap or advise away parts smaller than a huge page (the kernel
    refuses), or fork and have both write while the pool is empty (SIGBUS).

    :param start, length: multiples of ``page_size``, inside one private anonymous mapping.
    :raises TraceeError: it cannot be done; the process is as it was. :raises TraceeGone: it ended.

    Needs Linux 5.16 (mremap of huge pages) and ptrace rights. One thread of ours does all of it;
    the GIL is released where it waits.
    """
    with ExitStack() as stack:
        guard = stack.enter_context(_Guard())
        began = time.monotonic()
        stopped = stack.enter_context(StoppedThreads(pid))
        plan = plan_replacement(pid, start, length, page_size, stopped.tids)
        guard.tell(plan.encode())
        thread = stack.enter_context(borrow(pid, stopped.tids))
        copied = _replace(thread, plan, guard)
    return Replacement(start, length, page_size, copied, (time.monotonic() - began) * 1000)


def replaceable(pid: int, page_size: int) -> list[tuple[int, int]]:
    """``(start, end)`` of the whole huge pages inside each mapping that could be replaced and has
    anything in memory.

    :raises TraceeGone: no such process. :raises TraceeError: it is somebody else's.
    """
    check_page_size(page_size)
    found = []
    for mapping in mappings(pid):
        start, end = align_up(mapping.start, page_size), align_down(mapping.end, page_size)
        if start < end and mapping.rss and not _why_not(mapping):
            found.append((start, end))
    return found


def check_page_size(page_size: int) -> None:
    """:raises TraceeError: the kernel has no pool of such pages."""
    if (reason := why_no_pool(page_size)) is not None:
        raise TraceeError(reason)


def _why_not(mapping: ProcessMapping) -> str:
    """What speaks against replacing it; empty: nothing."""
    if not mapping.is_private_anonymous or "w" not in mapping.permissions:
        return "is not private anonymous memory that can be written"
    if mapping.name == "[stack]":
        return "is a stack"
    return next((why for flag, why in _UNMOVABLE.items() if flag in mapping.flags), "")


def _replace(thread: BorrowedThread, plan: Plan, guard: _Guard) -> int:
    advice = _advice(plan)
    fd = changes.open_userfaultfd(thread)
    guard.tell(b"take %d\n" % fd)
    changes.close(thread, fd)
    changes.map_fresh(thread, plan)
    try:
        for each in advice:
            changes.advise_fresh(thread, plan, each)
        guard.tell(b"guard\n")
        changes.move_aside(thread, plan)
    except BaseException:
        changes.unmap(thread, plan.fresh, plan)
        raise
    try:
        copied = _copy(plan)
        changes.move_in(thread, plan)
    except BaseException:
        changes.move_back(thread, plan)
        changes.unmap(thread, plan.fresh, plan)
        raise
    changes.unmap(thread, plan.aside, plan)
    guard.tell(b"done\n")
    return copied


def _copy(plan: Plan) -> int:
    """Only huge pages in which something is: the others stay what they were, nothing."""
    copied = 0
    for offset, length in populated(plan.pid, plan.aside, plan.length, unit=plan.page_size):
        write_memory(
            plan.pid, plan.fresh + offset, read_memory(plan.pid, plan.aside + offset, length)
        )
        copied += length
    return copied


# -- beforehand ---------------------------------------------------------------------------------


def plan_replacement(pid: int, start: int, length: int, page_size: int, tids: list[int]) -> Plan:
    """Where everything will go; nothing is done yet. ``tids``: threads of ``pid``, all stopped.

    :raises TraceeError: it cannot be done.
    """
    check_page_size(page_size)
    maps = mappings(pid)
    _check(maps, pid, start, length, page_size)
    aside = find_room(maps, length, page_size)
    taken = [*maps, _placeholder(aside, length)]
    fresh = find_room(sorted(taken, key=lambda m: m.start), length, page_size)
    tid = pid if pid in tids else tids[0]
    return Plan(pid, tid, start, length, page_size, aside, fresh, tuple(userfaultfds(pid)))


def _placeholder(start: int, length: int) -> ProcessMapping:
    return ProcessMapping(start, start + length, "---p", 0, 0, "", 0, 0, 0, 0, frozenset())


def _check(maps: list[ProcessMapping], pid: int, start: int, length: int, page_size: int) -> None:
    where = f"{start:#x}-{start + length:#x} of process {pid}"
    if length <= 0 or not (is_aligned(start, page_size) and is_aligned(length, page_size)):
        raise TraceeError(f"{where} is not made of whole pages of {format_size(page_size)}")
    inside = [m for m in maps if m.start <= start and start + length <= m.end]
    if not inside:
        raise TraceeError(f"{where} is not inside one mapping", hint=f"postcopy inspect {pid}")
    (found,) = inside
    if why := _why_not(found):
        raise TraceeError(f"{where} {why}")
    pinning = sorted(set(descriptors(pid).values()) & set(_PINNING))
    if pinning or any(m.name.startswith("/[aio]") for m in maps):
        raise TraceeError(f"process {pid} uses {', '.join(pinning) or 'aio'}, which may hold pages")


def _advice(plan: Plan) -> list[int]:
    flags = next(m.flags for m in mappings(plan.pid) if m.start <= plan.start < m.end)
    return [advice for flag, advice in _KEPT_ADVICE.items() if flag in flags]


# -- the keeper -----------------------------------------------------------------------------------


class _Guard:
    """The keeper as a process of its own, which survives us."""

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "migration.tracee.keeper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if error is not None:
            # Undone, or not begun. Who still waits at the place looks again.
            self._process.stdin.write(b"undone\n")
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def tell(self, line: bytes) -> None:
        """:raises TraceeError: the keeper cannot."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except BrokenPipeError:
            raise TraceeError("the keeper process has died") from None
        answer = self._process.stdout.readline().strip().decode()
        if answer != "ok":
            raise TraceeError(f"keeper: {answer.removeprefix('error ') or 'died'}")
