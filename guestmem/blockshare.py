"""RAMBlocks whose memory another process has too: named files, and memfds handed over."""

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator

from guestmem.backings import Backing, check_memfd, open_source
from guestmem.blockmemory import BlockMemory
from guestmem.errors import GuestMemoryError


class SharedMemory(BlockMemory):
    """Moves within one host: who may have the memory, and how it changes hands."""

    __slots__ = ()

    @property
    def is_named_file(self) -> bool:
        """Is it a file that another process can open by name (QEMU's ``--mem-path FILE``)?"""
        fd = self._open().fd
        return fd is not None and self.backing is Backing.FILE and os.fstat(fd).st_nlink > 0

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Nobody else has the named file as RAM meanwhile, as far as they say so by flock(2).

        :raises GuestMemoryError: ``EWOULDBLOCK``: somebody has.
        """
        fd = self._open().fd
        if fd is None or not self.is_named_file:
            yield
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise GuestMemoryError(
                error.errno or errno.EIO,
                f"block {self.idstr!r}: its file is another process's guest RAM",
                remedy="capability x-ignore-shared at both ends, to go on with that very memory; "
                "or another file",
            ) from None
        try:
            yield
        finally:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)

    @property
    def can_be_handed_over(self) -> bool:
        """Is it a memfd of ours, which another process can map and go on with?"""
        return self.backing in (Backing.MEMFD, Backing.HUGETLB)

    def adopt(self, fd: int) -> None:
        """Put another process's memory in the place of ours, behind every mapping. Ours is gone.

        Addresses, aliases and :attr:`fd` (the number) stay what they are, so whoever knows them
        sees the new memory. Nobody may use the block meanwhile.

        :param fd: a memfd of the same page size, at least ``max_length`` bytes long; the caller's.
        :raises ValueError: the block is not one that :attr:`can_be_handed_over`.
        :raises PageSizeMismatch: its pages have another size.
        :raises GuestMemoryError: no memfd or too short (``EINVAL``), or the kernel refused the
            mapping. The block is as it was.
        """
        source = self._open()
        what = f"adopting memory for block {self.idstr!r}"
        if not self.can_be_handed_over or source.fd is None:
            raise ValueError(f"block {self.idstr!r} is not made of a memfd")
        check_memfd(fd, source, what)
        try:
            self._map_everywhere(source, fd, what)
        except BaseException:
            self._map_everywhere(source, source.fd, what)
            raise
        # In one step too: the number is known to native code.
        os.dup2(fd, source.fd, inheritable=False)

    def renew(self) -> None:
        """Let go of memory that another process has, or had: new memory, which reads as zero.

        :raises ValueError, GuestMemoryError: as :meth:`allocate`. The block is as it was.
        """
        what, size = f"block {self.idstr!r}", self.page_size if self.is_hugetlb else None
        fresh = open_source(self.backing, self.max_length, what=what, hugepage_size=size, path=None)
        assert fresh.fd is not None
        try:
            self.adopt(fresh.fd)
        finally:
            os.close(fresh.fd)
        if self.policy is not None:
            self.set_policy(self.policy)
