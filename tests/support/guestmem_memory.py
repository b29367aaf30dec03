"""Real blocks of every kind of memory for the tests, and the huge pages that takes."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guestmem import Backing, RAMBlock
from guestmem.hugejournal import HugepageJournal
from guestmem.pools import HugepagePool
from tests.support.need import need

HUGE = 2 << 20
BASE = os.sysconf("SC_PAGE_SIZE")

#: Every kind of memory a block can have; the last two are files on a file system of their own.
KINDS = ("anon", "memfd", "hugetlb", "tmpfs-file", "hugetlbfs-file")


@dataclass(frozen=True)
class Kind:
    """How to ask for one kind of memory, and the host page it has."""

    name: str
    backing: Backing
    page_size: int
    path: str | None = None

    def block(self, idstr: str = "ram", pages: int = 4) -> RAMBlock:
        """A block of so many host pages."""
        return RAMBlock.allocate(
            idstr,
            pages * self.page_size,
            backing=self.backing,
            hugepage_size=self.page_size if self.page_size != BASE else None,
            path=self.path,
        )


@contextlib.contextmanager
def kind_of_memory(name: str, directory: Path, hugepages: int = 16) -> Iterator[Kind]:
    """One of :data:`KINDS`, with enough huge pages in the pool; all given back afterwards."""
    with contextlib.ExitStack() as stack:
        if name.startswith("hugetlb"):
            stack.enter_context(more_hugepages(hugepages, directory / "journal"))
        if name == "tmpfs-file":
            path = stack.enter_context(mounted("tmpfs", "size=64M", directory / "tmpfs"))
            yield Kind(name, Backing.FILE, BASE, str(path))
        elif name == "hugetlbfs-file":
            path = stack.enter_context(mounted("hugetlbfs", "pagesize=2M", directory / "huge"))
            yield Kind(name, Backing.FILE, HUGE, str(path))
        elif name == "hugetlb":
            yield Kind(name, Backing.HUGETLB, HUGE)
        else:
            yield Kind(name, Backing(name), BASE)


@contextlib.contextmanager
def more_hugepages(pages: int, journal: Path) -> Iterator[HugepagePool]:
    """Grow the 2 MiB pool by ``pages`` for a while."""
    need(os.geteuid() == 0, "huge pages need root", remedy="sudo -E python -m pytest")
    need(HugepagePool(HUGE).exists, "this kernel has no 2 MiB pages")
    takings = HugepageJournal(journal)
    with pool_lock():
        taking = takings.take(pages, HUGE, owned=True)
    try:
        yield taking.pool
    finally:
        with pool_lock():
            takings.give_back(taking.id)


@contextlib.contextmanager
def pool_lock() -> Iterator[None]:
    """Keep other test runs from changing the 2 MiB pool."""
    # Several test runs may share this host; each changes the one pool only while holding this.
    path = Path(tempfile.gettempdir()) / "postcopy-hugepages.lock"
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


@contextlib.contextmanager
def mounted(file_system: str, options: str, directory: Path) -> Iterator[Path]:
    """A fresh file system on ``directory``, unmounted afterwards."""
    need(os.geteuid() == 0, "mounting needs root", remedy="sudo -E python -m pytest")
    directory.mkdir()
    command = ["mount", "-t", file_system, "-o", options, "none", str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    need(done.returncode == 0, f"cannot mount {file_system}: {done.stderr.strip()}")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def open_fds() -> int:
    """How many file descriptors this process has."""
    return len(os.listdir("/proc/self/fd"))


def mapped_ranges() -> set[str]:
    """Address ranges of all mappings of this process that guest memory could be in."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[0] for line in lines if "memfd:guest-ram" in line or "guest-ram-" in line}
