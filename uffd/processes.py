"""Fetching a userfaultfd (or any fd) out of another process."""

from uffd._native import lib
from uffd.errors import check


def pidfd_open(pid: int) -> int:
    """A pidfd for ``pid``; the caller closes it. :raises ProcessGone:"""
    return check(lib.mem_pidfd_open(pid, 0), "pidfd_open")


def pidfd_getfd(pidfd: int, target_fd: int) -> int:
    """Duplicate fd number ``target_fd`` of another process into ours (close-on-exec).

    :raises NotPermitted: no ptrace-attach rights over the process.
    :raises ProcessGone: it has exited.
    """
    return check(lib.mem_pidfd_getfd(pidfd, target_fd), "pidfd_getfd")
