"""A mapping of our own, by address: anonymous, memfd or huge pages; private or shared.

For researchers, validation scripts and tests. Guest RAM has its own type in a higher room.
"""

import mmap
import os
from types import TracebackType
from typing import TYPE_CHECKING, Self

from uffd import touch
from uffd._native import ffi, lib
from uffd.advice import Advice, madvise
from uffd.errors import check
from uffd.files import file_system, memfd_create

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

_PROT_NONE = 0
_MAP_NORESERVE = 0x4000
_MREMAP_MAYMOVE, _MREMAP_FIXED, _MREMAP_DONTUNMAP = 1, 2, 4
PAGE_BYTES: int = os.sysconf("SC_PAGESIZE")


class Mapping:
    """Memory at ``address``, ``length`` bytes, ``page_size`` bytes per host page. A context
    manager.

    Accesses (:meth:`load`, :meth:`read` ...) check bounds and release the interpreter lock, so
    that they may sleep on missing pages.
    """

    def __init__(
        self, address: int, length: int, *, page_size: int, fd: int | None, is_shared: bool
    ) -> None:
        self.address = address
        self.length = length
        self.page_size = page_size
        #: The memfd behind it, owned by this object; ``None`` for anonymous memory.
        self.fd = fd
        self.is_shared = is_shared

    @classmethod
    def anonymous(cls, length: int, *, protection: int = mmap.PROT_READ | mmap.PROT_WRITE) -> Self:
        """Private anonymous memory. :param length: bytes, multiple of 4 KiB."""
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        address = _map(0, length, protection, flags, -1, 0)
        return cls(address, length, page_size=PAGE_BYTES, fd=None, is_shared=False)

    @classmethod
    def memfd(
        cls,
        length: int,
        *,
        hugepage_size: int | None = None,
        shared: bool = True,
        reserve: bool = True,
    ) -> Self:
        """A mapping of a new memory file, of huge pages if asked.

        :param shared: ``False`` maps it privately: writes go to anonymous copies.
        :param reserve: ``False`` (MAP_NORESERVE) lets a hugetlb mapping outgrow its pool; COPY
            then may find it empty.
        :raises OutOfMemory: the huge page pool is too small to reserve from.
        """
        fd = memfd_create("uffd-mapping", length, hugepage_size=hugepage_size)
        try:
            return cls.of_file(fd, length, shared=shared, reserve=reserve)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def of_file(
        cls,
        fd: int,
        length: int,
        *,
        offset: int = 0,
        shared: bool = True,
        reserve: bool = True,
        protection: int = mmap.PROT_READ | mmap.PROT_WRITE,
    ) -> Self:
        """Map ``fd``, which the new object then owns."""
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE
        flags |= 0 if reserve else _MAP_NORESERVE
        address = _map(0, length, protection, flags, fd, offset)
        page_size = file_system(fd).page_size
        return cls(address, length, page_size=page_size, fd=fd, is_shared=shared)

    def alias(self) -> "Mapping":
        """Another mapping of the same file: fill pages there, CONTINUE them here.

        :raises ValueError: anonymous memory has no second view.
        """
        if self.fd is None:
            raise ValueError("anonymous memory has no file to map again")
        return Mapping.of_file(os.dup(self.fd), self.length)

    def remap(self, length: int | None = None, *, keep_old: bool = False) -> "Mapping":
        """mremap to a new place, aligned to the host page; this object is then empty. The reader
        of the context must be running.

        :param keep_old: MREMAP_DONTUNMAP: the old range stays mapped, and empty; this object
            keeps it.
        :raises UffdError: the kernel refuses. The memory is where it was; some address space is
            lost, since the kernel does not tell whether somebody else has it by now.
        """
        new_length = self.length if length is None else length
        target = _reserve(new_length, self.page_size)
        flags = _MREMAP_MAYMOVE | _MREMAP_FIXED | (_MREMAP_DONTUNMAP if keep_old else 0)
        moved = ffi.new("uint64_t *")
        result = lib.mem_remap(self.address, self.length, new_length, flags, target, moved)
        check(result, "mremap", address=self.address, length=self.length)
        fd = self.fd if self.fd is None or not keep_old else os.dup(self.fd)
        new = Mapping(
            moved[0], new_length, page_size=self.page_size, fd=fd, is_shared=self.is_shared
        )
        if not keep_old:
            self.fd, self.length = None, 0
        return new

    def protect(self, protection: int) -> None:
        """mprotect the whole mapping (``mmap.PROT_*``)."""
        result = lib.mem_protect(self.address, self.length, protection)
        check(result, "mprotect", address=self.address, length=self.length)

    def advise(self, advice: Advice, offset: int = 0, length: int | None = None) -> None:
        count = self.length - offset if length is None else length
        self._check(offset, count)
        madvise(self.address + offset, count, advice)

    def page(self, index: int) -> int:
        """Address of the host page with this index."""
        self._check(index * self.page_size, self.page_size)
        return self.address + index * self.page_size

    @property
    def page_count(self) -> int:
        return self.length // self.page_size

    def _check(self, offset: int, length: int) -> int:
        if offset < 0 or length < 0 or offset + length > self.length:
            raise ValueError(f"[{offset:#x}, +{length:#x}) is outside of {self.length:#x} bytes")
        return self.address + offset

    def load(self, offset: int) -> int:
        return touch.load(self._check(offset, 1))

    def store(self, offset: int, value: int) -> None:
        touch.store(self._check(offset, 1), value)

    def read(self, offset: int, length: int) -> bytes:
        return touch.read(self._check(offset, length), length)

    def write(self, offset: int, data: "ReadableBuffer") -> None:
        touch.write(self._check(offset, memoryview(data).nbytes), data)

    def unsafe_view(self) -> memoryview:
        """The bytes as a memoryview. Touching a missing page through it holds the interpreter
        lock asleep.
        """
        pointer = ffi.cast("uint8_t *", self.address)
        return memoryview(ffi.buffer(pointer, self.length))

    def close(self) -> None:
        """Unmap and close the file. Nothing may sleep on the memory any more."""
        if self.length:
            length, self.length = self.length, 0
            check(
                lib.mem_unmap(self.address, length), "munmap", address=self.address, length=length
            )
        if self.fd is not None:
            fd, self.fd = self.fd, None
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _map(hint: int, length: int, protection: int, flags: int, fd: int, offset: int) -> int:
    address = ffi.new("uint64_t *")
    check(lib.mem_map(hint, length, protection, flags, fd, offset, address), "mmap", length=length)
    return int(address[0])


def _reserve(length: int, alignment: int) -> int:
    """Address space that nobody else gets, for a MREMAP_FIXED onto it.

    Huge pages go only where their size divides the address, else the kernel says EINVAL; it
    aligns large anonymous mappings by itself from Linux 6.7 on only.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    room = length + alignment - PAGE_BYTES
    start = _map(0, room, _PROT_NONE, flags, -1, 0)
    target = -(-start // alignment) * alignment
    end = target + length
    for address, excess in ((start, target - start), (end, start + room - end)):
        if excess:
            check(lib.mem_unmap(address, excess), "munmap", address=address, length=excess)
    return target
