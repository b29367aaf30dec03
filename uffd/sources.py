"""Where the bytes of missing pages come from: the page sources of a
:class:`uffd.handler.FaultHandler`.
"""

import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from uffd._native import ffi, lib
from uffd.errors import check
from uffd.operations import MemoryRange

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

FetchPage: TypeAlias = Callable[[int, int], "ReadableBuffer"]


@dataclass(frozen=True, slots=True)
class BufferSource:
    """Bytes in memory; byte 0 belongs to the range's start. What lies beyond the end reads as
    zeros.

    The buffer is not copied: its bytes at the time of the fault are placed. It must not itself be
    registered and missing.
    """

    buffer: "ReadableBuffer"


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file, mapped read-only; a memfd of another object too. Beyond its end are zeros.

    :param fd: any fd that can be mapped for reading; stays the caller's.
    :param offset: bytes, multiple of 4 KiB: the file's byte for the range's start.

    Truncating the file while it is served makes the handler end with BadAddress.
    """

    fd: int
    offset: int = 0


@dataclass(frozen=True, slots=True)
class PageCacheSource:
    """The range's own file already has the bytes, put there through another mapping: CONTINUE.

    Register the range MISSING|MINOR; holes of the file then come as zeros.
    """


@dataclass(frozen=True, slots=True)
class ZeroSource:
    """Zeros."""


@dataclass(frozen=True, slots=True)
class CallableSource:
    """A Python function ``fetch(offset, length)`` that returns exactly ``length`` bytes.

    ``offset`` counts from the range's start. It runs on the handler's thread, one call at a time,
    and needs the interpreter lock; so whoever touches the range must not hold it
    (:mod:`uffd.touch`), and the function must neither touch the range nor wait for a thread that
    does. An exception ends the handler and is raised by its ``join``; the sleeper keeps sleeping.
    """

    fetch: FetchPage


PageSource: TypeAlias = BufferSource | FileSource | PageCacheSource | ZeroSource | CallableSource


@dataclass(frozen=True, slots=True)
class Served:
    """A registered range and its page source.

    :param region: an object with ``address`` and ``length`` (bytes).
    :param page_size: the host page, bytes; ``None`` takes the region's own ``page_size``, else 4
        KiB.
    :param unit: bytes placed per fault, a multiple of ``page_size``; ``None`` is one page.
    """

    region: MemoryRange
    source: PageSource
    page_size: int | None = None
    unit: int | None = None

    def host_page(self) -> int:
        own = getattr(self.region, "page_size", None)
        return int(self.page_size or own or os.sysconf("SC_PAGESIZE"))


class BoundSource:
    """A source made ready for the C loop: where its bytes are, kept alive until :meth:`release`.

    ``start`` and ``extent`` are the range as it was when bound: the region's own idea of where it
    is changes when it is remapped, the source's offsets do not.
    """

    def __init__(self, served: Served) -> None:
        self.start = served.region.address
        self.extent = served.region.length
        self.page_size = served.host_page()
        self.unit = served.unit or self.page_size
        self.fetch: FetchPage | None = None
        self.address = 0
        self.length = 0
        self.kind = 0
        self._keep: Any = None
        self._mapped = 0
        match served.source:
            case BufferSource(buffer):
                self.kind = lib.FAULT_SOURCE_COPY
                self._keep = ffi.from_buffer("uint8_t[]", buffer)
                self.address = int(ffi.cast("uintptr_t", self._keep))
                self.length = len(self._keep)
            case FileSource(fd, offset):
                self.kind = lib.FAULT_SOURCE_COPY
                self._map_file(fd, offset, self.extent)
            case PageCacheSource():
                self.kind = lib.FAULT_SOURCE_PAGE_CACHE
            case ZeroSource():
                self.kind = lib.FAULT_SOURCE_ZERO
            case CallableSource(fetch):
                # Keyed by the address it was bound at, which survives an mremap of the range.
                self.kind = lib.FAULT_SOURCE_FETCH
                self.fetch = fetch
                self.address = self.start

    def _map_file(self, fd: int, offset: int, wanted: int) -> None:
        self.length = max(0, min(wanted, os.fstat(fd).st_size - offset))
        if self.length == 0:
            return
        address = ffi.new("uint64_t *")
        flags = mmap.MAP_SHARED
        result = lib.mem_map(0, self.length, mmap.PROT_READ, flags, fd, offset, address)
        check(result, "mmap page source", length=self.length)
        self.address, self._mapped = int(address[0]), self.length

    def __contains__(self, address: int) -> bool:
        return 0 <= address - self.start < self.extent

    def release(self) -> None:
        """Only after the loop that reads it has returned."""
        if self._mapped:
            lib.mem_unmap(self.address, self._mapped)
            self._mapped = 0
        self._keep = None
