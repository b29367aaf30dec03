"""A pool of huge pages that runs dry for one process alone: a limit on its control group.

The pool is everybody's on this machine; to really empty it would fail whoever else needs it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_CONTROLLER = "hugetlb"
_PLACES = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))


def place() -> Path | None:
    """Where control groups with huge pages can be made (cgroup2); None: nowhere here."""
    for root in _PLACES:
        with contextlib.suppress(OSError):
            offered = (root / "cgroup.controllers").read_text().split()
            if _CONTROLLER in offered and os.access(root / "cgroup.subtree_control", os.W_OK):
                return root
    return None


class HugeLimit:
    """The control group of one process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def now(self) -> None:
        """Not one page more than it has."""
        used = int((self._folder / "hugetlb.2MB.current").read_text())
        (self._folder / "hugetlb.2MB.max").write_text(str(used))

    def lift(self) -> None:
        """As many as there are."""
        (self._folder / "hugetlb.2MB.max").write_text("max")


@contextlib.contextmanager
def hugelimit(pid: int) -> Iterator[HugeLimit]:
    """A group with that process in it, gone afterwards; the process must have ended by then."""
    root = place()
    assert root is not None, "ask place() first"
    (root / "cgroup.subtree_control").write_text(f"+{_CONTROLLER}")
    folder = root / f"postcopy-chaos-{pid}"
    folder.mkdir()
    try:
        (folder / "cgroup.procs").write_text(str(pid))
        yield HugeLimit(folder)
    finally:
        folder.rmdir()
