"""File descriptors clients hand over (``getfd``), kept by name until a migration takes them.

Shared by all clients of a VM: a program may pass the descriptor on one connection and migrate on
another. The count is bounded; every descriptor is close-on-exec and closed at the latest with the
monitor.
"""

from __future__ import annotations

import os
import threading

from .errors import QMPError

FD_COUNT_MAX = 16


class FDStore:
    """Named descriptors. Threads: any."""

    def __init__(self) -> None:
        self._fds: dict[str, int] = {}
        self._lock = threading.Lock()

    def put(self, name: str, fd: int) -> None:
        """Keep ``fd`` (now ours); one of that name before it is closed.

        :raises QMPError: the name begins with a digit (it could not be told from a number), or
            there are too many. Then ``fd`` stays the caller's.
        """
        if not name or name[0].isdigit():
            raise QMPError(f"fdname {name!r}: a name that does not begin with a digit is needed")
        with self._lock:
            if name not in self._fds and len(self._fds) >= FD_COUNT_MAX:
                raise QMPError(f"{FD_COUNT_MAX} descriptors are stored already: use closefd")
            old = self._fds.pop(name, None)
            self._fds[name] = fd
        self.dispose(old)

    def take(self, name: str) -> int:
        """Hand the descriptor to the caller, who closes it from now on.

        :raises QMPError: no such name.
        """
        with self._lock:
            fd = self._fds.pop(name, None)
        if fd is None:
            raise QMPError(f"no descriptor is stored under the name {name!r}: use getfd first")
        return fd

    def close_all(self) -> None:
        """Close what nobody took."""
        with self._lock:
            fds, self._fds = list(self._fds.values()), {}
        for fd in fds:
            self.dispose(fd)

    @staticmethod
    def dispose(fd: int | None) -> None:
        """Close a descriptor, if there is one."""
        if fd is not None:
            os.close(fd)
