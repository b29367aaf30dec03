"""A stretch of our address space with guest memory in it."""

import mmap
import os

from guestmem._native import ffi, lib
from guestmem.errors import check
from guestmem.geometry import align_up


class Mapping:
    """``length`` bytes at ``host``, readable and writable, followed by an unreadable guard page.

    The kernel never copies it into a child (``MADV_DONTFORK``: a child would make pages shared,
    and a fork of a process with guest RAM is a mistake anyway) nor into a core dump
    (``MADV_DONTDUMP``: missing pages cannot be dumped, present ones are the guest's secrets).
    The guard keeps neighbouring mappings from being merged into ours.
    """

    __slots__ = ("_guard", "host", "length")

    def __init__(
        self, length: int, *, alignment: int, flags: int, fd: int = -1, what: str = "memory"
    ) -> None:
        """Map ``length`` bytes (a multiple of the host page) at a multiple of ``alignment``.

        :param flags: ``MAP_*``; ``fd`` is mapped from its start.
        :param what: names the block in errors.
        :raises GuestMemoryError: with the errno of mmap(2) or madvise(2). Nothing stays mapped.
        """
        self.length = length
        self._guard = os.sysconf("SC_PAGE_SIZE")
        self.host = _reserve(length + self._guard, alignment, what)
        try:
            _map_at(self.host, length, flags, fd, what)
            self.advise(mmap.MADV_DONTFORK, what=what)
            self.advise(mmap.MADV_DONTDUMP, what=what)
        except BaseException:
            self.close()
            raise

    def __contains__(self, address: int) -> bool:
        return self.host <= address < self.host + self.length

    def __repr__(self) -> str:
        return f"<Mapping {self.host:#x}+{self.length:#x}>"

    def advise(
        self, advice: int, offset: int = 0, length: int | None = None, *, what: str = "memory"
    ) -> None:
        """madvise(2) for a part, or all.

        :raises GuestMemoryError: with the kernel's errno.
        """
        length = self.length - offset if length is None else length
        check(
            lib.mem_madvise(self.host + offset, length, advice),
            f"{what}: advice {advice} at {self.host + offset:#x}+{length:#x}",
        )

    def replace(self, flags: int, fd: int, *, what: str = "memory") -> None:
        """Map something else at the same addresses, in one step: nobody ever finds a hole there.
        Advice given before is gone, but for what the constructor gives.

        :raises GuestMemoryError: with the errno of mmap(2) or madvise(2).
        """
        _map_at(self.host, self.length, flags, fd, what)
        self.advise(mmap.MADV_DONTFORK, what=what)
        self.advise(mmap.MADV_DONTDUMP, what=what)

    def close(self) -> None:
        """Unmap. Whoever still touches the addresses gets SIGSEGV. Harmless the second time."""
        if self.host:
            host, self.host = self.host, 0
            check(lib.mem_unmap(host, self.length + self._guard), f"unmapping {host:#x}")


def _reserve(length: int, alignment: int, what: str) -> int:
    """Keep ``length`` bytes of aligned address space for us; unreadable, costs no memory.

    Nobody else can map anything inside while we replace it piece by piece with MAP_FIXED.
    """
    base_page = os.sysconf("SC_PAGE_SIZE")
    total = length + alignment - base_page
    out = ffi.new("uint64_t *")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | lib.MAP_NORESERVE
    check(lib.mem_map(0, total, 0, flags, -1, 0, out), f"{what}: {total:#x} bytes of addresses")
    address: int = out[0]
    start = align_up(address, alignment)
    if start > address:
        check(lib.mem_unmap(address, start - address), f"{what}: trimming addresses")
    if address + total > start + length:
        check(
            lib.mem_unmap(start + length, address + total - start - length),
            f"{what}: trimming addresses",
        )
    return start


def _map_at(host: int, length: int, flags: int, fd: int, what: str) -> None:
    out = ffi.new("uint64_t *")
    protection = mmap.PROT_READ | mmap.PROT_WRITE
    check(
        lib.mem_map(host, length, protection, flags | lib.MAP_FIXED, fd, 0, out),
        f"{what}: mapping {length:#x} bytes",
    )
