"""A hugetlb file system that holds fewer pages than the pool: an empty pool without taking
everybody's pages away.
"""

import ctypes
import os
import tempfile

from scripts.validate.check import Skipped
from scripts.validate.kinds import HUGE

_CLONE_NEWNS = 0x20000
_MS_REC_PRIVATE = 0x4000 | 1 << 18


def file_of_limited_mount(*, limit: int, length: int) -> int:
    """A file of ``length`` bytes on a mount of at most ``limit`` bytes of 2 MiB pages.

    The mount is made in a mount namespace of this process and goes with it.

    :raises Skipped: not allowed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    directory = tempfile.mkdtemp(prefix="validate-kernel-")
    try:
        if libc.unshare(_CLONE_NEWNS) < 0 or libc.mount(b"none", b"/", None, _MS_REC_PRIVATE, None):
            raise Skipped(f"no mount namespace: {os.strerror(ctypes.get_errno())}", "run as root")
        options = f"pagesize={HUGE >> 20}M,size={limit}".encode()
        if libc.mount(b"none", directory.encode(), b"hugetlbfs", 0, options) < 0:
            raise Skipped(f"no hugetlb mount: {os.strerror(ctypes.get_errno())}", "run as root")
        fd = os.open(f"{directory}/file", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, length)
        libc.umount2(directory.encode(), 2)  # lazily: the file keeps it alive
        return fd
    finally:
        os.rmdir(directory)
