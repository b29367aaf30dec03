"""Where a block's memory comes from, and what that means for its pages.

=========  ==========================================  ============  ===========================
backing    what                                        host page     a discarded page
=========  ==========================================  ============  ===========================
ANON       private anonymous memory                    base page     ``MADV_DONTNEED``
MEMFD      memfd, mapped shared                        base page     hole punched in the memfd
HUGETLB    memfd of huge pages, reserved up front      2 MiB, 1 GiB  hole punched, reserved anew
FILE       a file at ``path``, mapped shared           file system   hole punched in the file
=========  ==========================================  ============  ===========================

Huge pages are reserved when the block is made, unless told not to (QEMU's ``reserve=off``). Without
a reservation the pool can run dry later, and then a touch is SIGBUS and a userfaultfd COPY answers
``EEXIST``, which reads as success.
"""

import contextlib
import enum
import errno
import fcntl
import mmap
import os
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from guestmem._native import ffi, lib
from guestmem.errors import GuestMemoryError, PageSizeMismatch, check
from guestmem.geometry import align_up, format_size, is_power_of_two
from guestmem.pools import page_sizes

_MFD_HUGE_SHIFT = 26
DEFAULT_HUGEPAGE_BYTES = 2 << 20


class Backing(enum.Enum):
    """Kind of memory behind a RAMBlock; see the module's table."""

    ANON = "anon"
    MEMFD = "memfd"
    HUGETLB = "hugetlb"
    FILE = "file"


@dataclass(frozen=True)
class Source:
    """What to map: a file descriptor (owned by the block), or ``None`` for anonymous memory.

    :ivar page_size: bytes of a host page. :ivar length: multiple of it, the file's used part.
    :ivar is_reserved: huge pages are promised by the kernel before they are touched.
    """

    fd: int | None
    page_size: int
    length: int
    is_hugetlb: bool = False
    is_reserved: bool = True

    @property
    def map_flags(self) -> int:
        """``MAP_*`` flags of every mapping. Hugetlb is mapped **with** a reservation unless told
        otherwise."""
        if self.fd is None:
            return mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | lib.MAP_NORESERVE
        reserves = self.is_hugetlb and self.is_reserved
        return mmap.MAP_SHARED if reserves else mmap.MAP_SHARED | lib.MAP_NORESERVE


def open_source(
    backing: Backing, length: int, *, what: str, hugepage_size: int | None, path: str | None
) -> Source:
    """Open what a block of ``length`` bytes is mapped from.

    :param what: names the block in errors.
    :param hugepage_size: HUGETLB: page size, 2 MiB if ``None``. FILE: ``None`` takes what the file
        system has, a number insists on it.
    :raises HugepagesShort: the pool cannot back the whole block.
    :raises PageSizeMismatch: the file's pages are not those asked for.
    :raises GuestMemoryError: anything else the kernel refuses, with its errno.
    """
    if (path is not None) != (backing is Backing.FILE):
        raise ValueError(f"{what}: a path goes with Backing.FILE, and only with it")
    if hugepage_size is not None and not is_power_of_two(hugepage_size):
        raise ValueError(f"{what}: {hugepage_size} is not a page size")
    if backing is Backing.ANON:
        base_page = base_page_bytes()
        return Source(None, base_page, align_up(length, base_page))
    if backing is Backing.MEMFD:
        return _open_memfd(length, what)
    if backing is Backing.HUGETLB:
        return _open_hugetlb(length, hugepage_size or DEFAULT_HUGEPAGE_BYTES, what)
    assert path is not None
    return _open_file(path, length, hugepage_size, what)


def base_page_bytes() -> int:
    """Size of the host's smallest page."""
    return os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def _close_on_error(fd: int) -> Iterator[int]:
    try:
        yield fd
    except BaseException:
        os.close(fd)
        raise


def _truncate(fd: int, length: int, what: str) -> None:
    try:
        os.ftruncate(fd, length)
    except OSError as error:
        raise GuestMemoryError(error.errno or errno.EIO, f"{what}: {length} bytes") from None


def _open_memfd(length: int, what: str) -> Source:
    base_page = base_page_bytes()
    length = align_up(length, base_page)
    flags = lib.MFD_CLOEXEC | lib.MFD_ALLOW_SEALING
    fd = check(lib.mem_memfd_create(b"guest-ram", flags), f"{what}: memfd_create")
    with _close_on_error(fd):
        _truncate(fd, length, what)
        _seal_size(fd, what)
    return Source(fd, base_page, length)


def _open_hugetlb(length: int, page_size: int, what: str) -> Source:
    length = align_up(length, page_size)
    size_code = (page_size.bit_length() - 1) << _MFD_HUGE_SHIFT
    flags = lib.MFD_CLOEXEC | lib.MFD_ALLOW_SEALING | lib.MFD_HUGETLB | size_code
    fd = lib.mem_memfd_create(b"guest-ram", flags)
    if fd == -errno.ENODEV:
        pools = ", ".join(format_size(size) for size in page_sizes()) or "none"
        raise GuestMemoryError(
            errno.ENODEV,
            f"{what}: this kernel has no huge pages of {format_size(page_size)} (it has: {pools})",
        )
    check(fd, f"{what}: memfd_create with huge pages")
    with _close_on_error(fd):
        found = _file_page_size(fd, what)
        if found != page_size:
            raise PageSizeMismatch(what, wanted=page_size, found=found)
        _truncate(fd, length, what)
        _seal_size(fd, what)
    return Source(fd, page_size, length, is_hugetlb=True)


def _seal_size(fd: int, what: str) -> None:
    """Whoever is handed this memory can rely on its length. Holes may still be punched."""
    try:
        fcntl.fcntl(
            fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        )
    except OSError as error:
        raise GuestMemoryError(error.errno or errno.EIO, f"{what}: sealing its size") from None


def _statfs(fd: int, what: str) -> tuple[int, int, int | None]:
    """File system magic, block size, and bytes free (``None``: no limit)."""
    info: Any = ffi.new("struct backing_info *")
    check(lib.backing_statfs(fd, info), f"{what}: fstatfs")
    free = info.free_blocks * info.block_size if info.total_blocks else None
    return info.fs_magic, info.block_size, free


def _file_page_size(fd: int, what: str) -> int:
    # Only hugetlbfs tells its page size there; others tell an I/O size (1 MiB and more exist).
    magic, block_size, _ = _statfs(fd, what)
    return block_size if magic == lib.BACKING_FS_HUGETLB else base_page_bytes()


def check_memfd(fd: int, like: Source, what: str) -> None:
    """Can a block made from ``like`` be mapped from ``fd`` instead?

    :raises PageSizeMismatch: other pages. :raises GuestMemoryError: no memfd, or too short, or one
        that may still shrink under us (``EINVAL``): touching what was cut off would be a SIGBUS.
    """
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        raise GuestMemoryError(errno.EINVAL, f"{what}: not a memfd") from None
    found = _file_page_size(fd, what)
    if found != like.page_size:
        raise PageSizeMismatch(what, wanted=like.page_size, found=found)
    length = os.fstat(fd).st_size
    if length < like.length:
        raise GuestMemoryError(
            errno.EINVAL, f"{what}: the memfd has {length} bytes, {like.length} are needed"
        )
    if not seals & fcntl.F_SEAL_SHRINK:
        raise GuestMemoryError(errno.EINVAL, f"{what}: the memfd is not sealed against shrinking")


def _open_file(path: str, length: int, wanted: int | None, what: str) -> Source:
    what = f"{what} ({path})"
    fd, created = _open_path(path, what)
    try:
        with _close_on_error(fd):
            page_size = _file_page_size(fd, what)
            if wanted is not None and page_size != wanted:
                raise PageSizeMismatch(what, wanted=wanted, found=page_size)
            length = align_up(length, page_size)
            _size_file(fd, length, what)
            # Said to those who would empty it; a file system without locks has nobody to tell.
            with contextlib.suppress(OSError):
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BaseException:
        if created:
            os.unlink(path)
        raise
    return Source(fd, page_size, length, is_hugetlb=page_size != base_page_bytes())


def _open_path(path: str, what: str) -> tuple[int, bool]:
    """An fd for a nameless file in a directory, or for the file itself; was a name created?"""
    try:
        if os.path.isdir(path):
            fd, name = tempfile.mkstemp(prefix="guest-ram-", dir=path)
            os.unlink(name)
            return fd, False
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC), False
        except FileNotFoundError:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT | os.O_EXCL, 0o600), True
    except OSError as error:
        raise GuestMemoryError(error.errno or errno.EIO, f"{what}: open") from None


def _size_file(fd: int, length: int, what: str) -> None:
    """Make an empty file ``length`` bytes long; a file with contents must be long enough."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise GuestMemoryError(errno.EINVAL, f"{what}: guest RAM must be a regular file")
    if 0 < status.st_size < length:
        raise GuestMemoryError(
            errno.EFBIG,
            f"{what}: the file has {status.st_size} bytes, the block needs {length}",
            remedy="give an empty file, a directory, or a file of the right size",
        )
    magic, _, free = _statfs(fd, what)
    # A tmpfs that fills up later kills whoever touches the next page with SIGBUS: refuse now.
    if magic == lib.BACKING_FS_TMPFS and free is not None:
        missing = length - status.st_blocks * 512
        if missing > free:
            raise GuestMemoryError(
                errno.ENOSPC, f"{what}: needs {missing} more bytes, the file system has {free}"
            )
    if status.st_size == 0:
        _truncate(fd, length, what)
