"""The kernel's huge page pools: one per page size, and one per page size and NUMA node.

A pool's ``free`` pages include those already promised to mappings that have not touched them
(``reserved``), so what a new block can have is the difference.

Source: kernel ``Documentation/admin-guide/mm/hugetlbpage.rst``.
"""

import re
from dataclasses import dataclass
from pathlib import Path

from guestmem.geometry import format_size

_SYSTEM = Path("/sys/kernel/mm/hugepages")
_NODES = Path("/sys/devices/system/node")
_NAME = re.compile(r"hugepages-(\d+)kB")
_BELOW_ZERO = 1 << 63  # sysfs shows the kernel's signed counts as unsigned ones


@dataclass(frozen=True)
class PoolState:
    """One look at a pool, in pages. ``reserved`` and ``overcommit`` are 0 for a node's pool: the
    kernel has them for the whole system only.

    :ivar surplus: pages made beyond the persistent ones; each goes when its user frees it.
    :ivar overcommit: how many surplus pages there may be at most.
    """

    total: int
    free: int
    reserved: int
    surplus: int
    overcommit: int = 0

    @property
    def persistent(self) -> int:
        """Pages the administrator asked for: without surplus, which goes when it is freed."""
        return self.total - self.surplus

    @property
    def available(self) -> int:
        """Pages of the pool that a new block can have.

        Linux 5.10 counts a reservation too many off when a huge page is placed: below zero, which
        reads as a huge number, nothing is promised.
        """
        return self.free if self.reserved >= _BELOW_ZERO else max(0, self.free - self.reserved)

    @property
    def obtainable(self) -> int:
        """The same, and what the kernel would try to make as surplus."""
        return self.available + max(0, self.overcommit - self.surplus)


@dataclass(frozen=True)
class HugepagePool:
    """The pool of pages of ``page_size`` bytes, of the system or of one NUMA ``node``."""

    page_size: int
    node: int | None = None

    @property
    def directory(self) -> Path:
        """Its directory in sysfs."""
        name = f"hugepages-{self.page_size >> 10}kB"
        return _SYSTEM / name if self.node is None else _NODES / f"node{self.node}/hugepages/{name}"

    @property
    def exists(self) -> bool:
        """Does this kernel have pages of this size (on this node)?"""
        return self.directory.is_dir()

    def state(self) -> PoolState:
        """The counters now. Each is read on its own: they may disagree while others use the pool.

        :raises FileNotFoundError: no such pool.
        """
        return PoolState(
            total=self._read("nr_hugepages"),
            free=self._read("free_hugepages"),
            reserved=self._read("resv_hugepages") if self.node is None else 0,
            surplus=self._read("surplus_hugepages"),
            overcommit=self._read("nr_overcommit_hugepages") if self.node is None else 0,
        )

    def set_persistent(self, pages: int) -> int:
        """Ask for a pool of ``pages``; how many persistent ones it has afterwards.

        The kernel gives what it can find without an error, so the result may be less than asked.
        Taking pages away that are in use turns them into surplus, which goes when they are freed.

        :raises PermissionError: not root. :raises FileNotFoundError: no such pool.
        """
        (self.directory / "nr_hugepages").write_text(f"{pages}\n")
        return self.state().persistent

    def set_overcommit(self, pages: int) -> int:
        """Allow so many surplus pages; what the kernel has noted (none for sizes it cannot make).

        :raises PermissionError: not root. :raises OSError: ``EINVAL``: 1 GiB pages have none.
        """
        (self.directory / "nr_overcommit_hugepages").write_text(f"{pages}\n")
        return self.state().overcommit

    def _read(self, name: str) -> int:
        return int((self.directory / name).read_text())


def page_sizes() -> list[int]:
    """Sizes of huge page this kernel has pools for, in bytes, smallest first."""
    if not _SYSTEM.is_dir():
        return []
    found = (_NAME.fullmatch(entry.name) for entry in _SYSTEM.iterdir())
    return sorted(int(match[1]) << 10 for match in found if match)


def why_no_pool(page_size: int) -> str | None:
    """What to say of a size this kernel has no pool for; ``None``: it has one."""
    if page_size in (sizes := page_sizes()):
        return None
    have = ", ".join(map(format_size, sizes)) or "none"
    return f"no huge pages of {format_size(page_size)} (this kernel has: {have})"


def nodes() -> list[int]:
    """NUMA nodes that have memory of their own to take huge pages from."""
    found = (
        re.fullmatch(r"node(\d+)/hugepages", str(entry.relative_to(_NODES)))
        for entry in _NODES.glob("node*/hugepages")
    )
    return sorted(int(match[1]) for match in found if match)
