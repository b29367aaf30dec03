"""The system calls a replacement makes in the other process. Each is all or nothing."""

from __future__ import annotations

import errno
import mmap
import os

from guestmem.geometry import format_size, size_option
from guestmem.pools import HugepagePool

from .calls import BorrowedThread
from .errors import TraceeError
from .plan import Plan

_MMAP, _MUNMAP, _MREMAP, _MADVISE, _CLOSE, _USERFAULTFD = 9, 11, 25, 28, 3, 323
_MAP_FIXED_NOREPLACE, _MAP_HUGETLB, _HUGE_SHIFT = 0x100000, 0x40000, 26
_MAYMOVE, _FIXED, _DONTUNMAP = 1, 2, 4
_USER_MODE_ONLY = 1
_NO_FD = (1 << 64) - 1


def open_userfaultfd(thread: BorrowedThread) -> int:
    """A userfaultfd of its own memory; its number there."""
    flags = os.O_CLOEXEC | os.O_NONBLOCK
    fd = thread.call(_USERFAULTFD, flags)
    if fd == -errno.EPERM:
        fd = thread.call(_USERFAULTFD, flags | _USER_MODE_ONLY)
    return _checked(fd, "userfaultfd")


def close(thread: BorrowedThread, fd: int) -> None:
    """close(2) there."""
    thread.call(_CLOSE, fd)


def map_fresh(thread: BorrowedThread, plan: Plan) -> None:
    """The huge pages, reserved but not there yet. :raises TraceeError: the pool is short."""
    huge = _MAP_HUGETLB | (plan.page_size.bit_length() - 1) << _HUGE_SHIFT
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED_NOREPLACE | huge
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    result = thread.call(_MMAP, plan.fresh, plan.length, protection, flags, _NO_FD, 0)
    if result == -errno.ENOMEM:
        raise _too_few(plan)
    _checked(result, "mmap of huge pages")


def _too_few(plan: Plan) -> TraceeError:
    pages, size = plan.length // plan.page_size, format_size(plan.page_size)
    free = HugepagePool(plan.page_size).state().available
    if free >= pages:  # the kernel says the same of limits that are the process's own
        return TraceeError(
            f"the kernel refuses the process {pages} huge pages of {size}, though {free} are free",
            hint="look at the limits of its cgroup (hugetlb), its NUMA policy, and RLIMIT_AS",
        )
    return TraceeError(
        f"the pool does not have {pages} free pages of {size}: {free} are free",
        hint=f"postcopy hugepages reserve {pages - free} --size {size_option(plan.page_size)}",
    )


def advise_fresh(thread: BorrowedThread, plan: Plan, advice: int) -> None:
    """madvise(2) for the new mapping."""
    result = thread.call(_MADVISE, plan.fresh, plan.length, advice)
    _checked(result, f"madvise {advice}")


def move_aside(thread: BorrowedThread, plan: Plan) -> None:
    """All pages go; the place stays mapped, and empty."""
    flags = _MAYMOVE | _FIXED | _DONTUNMAP
    result = thread.call(_MREMAP, plan.start, plan.length, plan.length, flags, plan.aside)
    _checked(result, "mremap aside")


def move_back(thread: BorrowedThread, plan: Plan) -> None:
    """Undo :func:`move_aside`."""
    _move(thread, plan.aside, plan, "mremap back")


def move_in(thread: BorrowedThread, plan: Plan) -> None:
    """The new mapping takes the place."""
    _move(thread, plan.fresh, plan, "mremap of huge pages")


def _move(thread: BorrowedThread, source: int, plan: Plan, what: str) -> None:
    result = thread.call(_MREMAP, source, plan.length, plan.length, _MAYMOVE | _FIXED, plan.start)
    _checked(result, what)


def unmap(thread: BorrowedThread, address: int, plan: Plan) -> None:
    """munmap(2) there; harmless where nothing is mapped."""
    _checked(thread.call(_MUNMAP, address, plan.length), "munmap")


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise TraceeError(f"{what} in the process: {os.strerror(-result)}")
    return result
