"""Memory files: memfd with huge pages and seals, hole punching, and what a file's page size is."""

import fcntl
import os
from dataclasses import dataclass
from enum import IntFlag

from uffd._native import ffi, lib
from uffd.errors import check

_HUGE_SHIFT = 26
_KEEP_SIZE, _PUNCH_HOLE = 1, 2
_HUGETLBFS_MAGIC, _TMPFS_MAGIC = 0x958458F6, 0x01021994
_F_ADD_SEALS, _F_GET_SEALS = 1033, 1034


class MemfdFlag(IntFlag):
    NONE = 0
    CLOEXEC = 1
    ALLOW_SEALING = 2
    HUGETLB = 4
    NOEXEC_SEAL = 8  # 6.3
    EXEC = 16  # 6.3


class Seal(IntFlag):
    NONE = 0
    SEAL = 1
    SHRINK = 2
    GROW = 4
    WRITE = 8
    FUTURE_WRITE = 16


@dataclass(frozen=True, slots=True)
class FileSystem:
    """What kind of memory a file is. ``page_size`` is the host page of a mapping of it, in
    bytes.
    """

    is_hugetlb: bool
    is_shmem: bool
    page_size: int


def memfd_create(
    name: str,
    length: int = 0,
    *,
    hugepage_size: int | None = None,
    flags: MemfdFlag = MemfdFlag.CLOEXEC,
) -> int:
    """Create a memory file and return its fd.

    :param length: bytes; a multiple of ``hugepage_size`` if given.
    :param hugepage_size: bytes, a power of two the kernel has a pool for.
    :raises UffdError: ENODEV for a huge page size the kernel does not have.
    """
    bits = int(flags)
    if hugepage_size is not None:
        bits |= MemfdFlag.HUGETLB | (hugepage_size.bit_length() - 1) << _HUGE_SHIFT
    fd = check(lib.mem_memfd_create(name.encode(), bits), "memfd_create")
    try:
        if length:
            os.ftruncate(fd, length)
    except BaseException:
        os.close(fd)
        raise
    return fd


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free pages of a file for every mapping of it. No userfaultfd event tells of it.

    On hugetlb whole huge pages are freed and partial ends are zeroed in place.
    """
    mode = _PUNCH_HOLE | _KEEP_SIZE
    check(lib.mem_fallocate(fd, mode, offset, length), "fallocate PUNCH_HOLE", length=length)


def allocate(fd: int, offset: int, length: int) -> None:
    """Reserve pages of a file now, so that placing them later cannot run out."""
    check(lib.mem_fallocate(fd, 0, offset, length), "fallocate", length=length)


def add_seals(fd: int, seals: Seal) -> None:
    """Seal a memfd made with ALLOW_SEALING. A WRITE seal makes REGISTER fail with NotPermitted."""
    fcntl.fcntl(fd, _F_ADD_SEALS, int(seals))


def get_seals(fd: int) -> Seal:
    return Seal(fcntl.fcntl(fd, _F_GET_SEALS))


def file_system(fd: int) -> FileSystem:
    """hugetlb and shmem tell themselves through fstatfs, for memfds too."""
    kind, block = ffi.new("uint64_t *"), ffi.new("uint64_t *")
    check(lib.mem_fstatfs(fd, kind, block), "fstatfs")
    is_hugetlb = kind[0] == _HUGETLBFS_MAGIC
    page_size = int(block[0]) if is_hugetlb else os.sysconf("SC_PAGESIZE")
    return FileSystem(is_hugetlb, kind[0] == _TMPFS_MAGIC, page_size)
