"""What one block's memory is to be like, decided before it is allocated: QEMU's memory backends."""

from dataclasses import dataclass

from guestmem.backings import Backing
from guestmem.numa import NumaPolicy
from guestmem.prealloc import THREADS_MAX
from guestmem.ramblock import RAMBlock


@dataclass(frozen=True)
class MemoryBackend:
    """How to get a block's memory; each side of a migration has its own.

    :ivar path: ``Backing.FILE``: a directory or file.
    :ivar hugepage_size: HUGETLB: bytes of a page, 2 MiB unless told. FILE: insist on such pages.
    :ivar is_reserved: huge pages are promised by the kernel at allocation (QEMU's ``reserve``).
    :ivar policy: NUMA nodes; ``None``: as the process has it.
    :ivar prealloc_threads: populate all pages at the start with so many threads; 0: do not.
    """

    backing: Backing = Backing.ANON
    path: str | None = None
    hugepage_size: int | None = None
    is_reserved: bool = True
    policy: NumaPolicy | None = None
    prealloc_threads: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.prealloc_threads <= THREADS_MAX:
            raise ValueError(
                f"{self.prealloc_threads} threads to preallocate with: 1 to {THREADS_MAX}"
            )

    def allocate(self, idstr: str, length: int) -> RAMBlock:
        """A block; not preallocated yet. Errors as :meth:`guestmem.ramblock.RAMBlock.allocate`."""
        sized = self.backing in (Backing.HUGETLB, Backing.FILE)
        return RAMBlock.allocate(
            idstr,
            length,
            backing=self.backing,
            hugepage_size=self.hugepage_size if sized else None,
            path=self.path,
            policy=self.policy,
            is_reserved=self.is_reserved,
        )
