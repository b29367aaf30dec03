"""The memory types userfaultfd serves, and fresh mappings of each."""

import mmap
import os
from dataclasses import dataclass

from guestmem.pools import HugepagePool
from scripts.validate import raw
from scripts.validate.check import Skipped
from uffd import Feature, Mapping, OutOfMemory

PAGE: int = os.sysconf("SC_PAGESIZE")
HUGE = 2 << 20
GIGANTIC = 1 << 30


@dataclass(frozen=True)
class Kind:
    """A memory type; ``page_size`` is its host page in bytes."""

    name: str
    page_size: int = PAGE
    is_shared: bool = False
    is_file: bool = False

    @property
    def is_hugetlb(self) -> bool:
        return self.page_size > PAGE

    @property
    def has_minor(self) -> bool:
        return self.is_file

    @property
    def missing_feature(self) -> Feature:
        """What a kernel must report to serve missing faults there."""
        if self.is_hugetlb:
            return Feature.MISSING_HUGETLBFS
        return Feature.MISSING_SHMEM if self.is_file else Feature.NONE

    @property
    def minor_feature(self) -> Feature:
        return Feature.MINOR_HUGETLBFS if self.is_hugetlb else Feature.MINOR_SHMEM

    @property
    def wp_feature(self) -> Feature:
        return Feature.WP_HUGETLBFS_SHMEM if self.is_file else Feature.PAGEFAULT_FLAG_WP

    def map(self, pages: int) -> Mapping:
        """A fresh mapping of ``pages`` host pages, all absent.

        :raises Skipped: hugetlb, and others on this host took the pages meanwhile.
        """
        length = pages * self.page_size
        if not self.is_file:
            return Mapping.anonymous(length)
        huge = self.page_size if self.is_hugetlb else None
        try:
            return Mapping.memfd(length, hugepage_size=huge, shared=self.is_shared)
        except OutOfMemory:
            if not self.is_hugetlb or HugepagePool(HUGE).state().available >= pages:
                raise
            reason = "others on this host took the huge pages meanwhile"
            raise Skipped(reason, f"python -m guestmem.hugepages reserve {pages}") from None


ANON = Kind("anon")
SHMEM = Kind("shmem", is_shared=True, is_file=True)
SHMEM_PRIVATE = Kind("shmem-private", is_file=True)
HUGETLB = Kind("hugetlb", page_size=HUGE, is_shared=True, is_file=True)
HUGETLB_PRIVATE = Kind("hugetlb-private", page_size=HUGE, is_file=True)

KINDS = {k.name: k for k in (ANON, SHMEM, SHMEM_PRIVATE, HUGETLB, HUGETLB_PRIVATE)}
ALL = tuple(KINDS)
SHARED = ("shmem", "hugetlb")


def aligned(length: int, alignment: int, *, offset: int = 0) -> Mapping:
    """Private anonymous memory that starts ``offset`` bytes behind a multiple of ``alignment``.

    The rest of the larger mapping it is cut from stays mapped and untouched.
    """
    return cut(Mapping.anonymous(length + 2 * alignment), length, alignment, offset)


def cut(whole: Mapping, length: int, alignment: int, offset: int = 0) -> Mapping:
    """A suitable part of ``whole`` that touches neither of its ends."""
    start = (whole.address // alignment + 1) * alignment + offset
    return Mapping(start, length, page_size=whole.page_size, fd=whole.fd, is_shared=whole.is_shared)


def aligned_file(fd: int, length: int, alignment: int, *, shared: bool = True) -> Mapping:
    """``length`` bytes of ``fd`` mapped at a multiple of ``alignment`` (so that huge pages of the
    file can be mapped whole). The fd then belongs to the mapping.
    """
    room = aligned(length, alignment)
    flags = (mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE) | _MAP_FIXED
    raw.map_memory(room.address, length, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    return Mapping(room.address, length, page_size=PAGE, fd=fd, is_shared=shared)


_MAP_FIXED = 0x10


def page_bytes(index: int, page_size: int = PAGE, salt: int = 0) -> bytes:
    """Bytes that tell pages (and salts) apart: the first says which, no two alike in a row."""
    seed = (index * 7 + salt * 31 + 1) % 251 + 1
    body = bytes((seed + i) % 255 + 1 for i in range(251))
    return (bytes([seed]) + body * (page_size // len(body) + 1))[:page_size]


def pattern(mapping: Mapping, first: int = 0, count: int | None = None, salt: int = 0) -> bytes:
    """:func:`page_bytes` of ``count`` host pages from index ``first`` (default: all)."""
    count = mapping.page_count - first if count is None else count
    return b"".join(page_bytes(i, mapping.page_size, salt) for i in range(first, first + count))


def inverted(data: bytes) -> bytes:
    """Every bit the other way: what a handler writes to show that it was there."""
    return data.translate(bytes(255 - i for i in range(256)))
