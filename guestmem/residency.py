"""Which pages of a block exist, found out without touching any."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

from guestmem._native import ffi, lib
from guestmem.bitmap import Bitmap
from guestmem.errors import GuestMemoryError
from guestmem.geometry import TARGET_PAGE_BITS, align_down, align_up, touched_pages
from guestmem.mapping import Mapping

_PAGEMAP = Path("/proc/self/pagemap")

# pagemap: one little-endian u64 per base page. An entry whose "swapped" bit is set is in swap only
# if its swap type is a real one; the last type stands for markers left on an absent page
# (write-protect, poison, guard).
_PRESENT = 1 << 63
_SWAPPED = 1 << 62
_SWAP_TYPE = 0x1F
_MARKER = 0x1F


def is_mapped_page(address: int) -> bool:
    """Does our page table have a page at ``address``, in memory or swap? Markers do not count."""
    base_page = os.sysconf("SC_PAGE_SIZE")
    fd = os.open(_PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    try:
        entry = int.from_bytes(os.pread(fd, 8, address // base_page * 8), "little")
    finally:
        os.close(fd)
    if entry & _PRESENT:
        return True
    return bool(entry & _SWAPPED) and entry & _SWAP_TYPE != _MARKER


def is_page_in_file(fd: int, offset: int) -> bool:
    """Does a file that is no hugetlbfs file have a page at ``offset``, mapped or not?"""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) == offset
    except OSError as error:
        if error.errno == errno.ENXIO:  # no data from here to the end
            return False
        raise


def populated_by_mappings(mappings: tuple[Mapping, ...], length: int, into: Bitmap) -> None:
    """Set the bits of pages that any of the mappings has; all bits if the kernel cannot tell."""
    fd = os.open(_PAGEMAP, os.O_RDONLY | os.O_CLOEXEC)
    try:
        for mapping in mappings:
            words = ffi.cast("uint64_t *", into.address)
            result = lib.pagescan_populated(
                fd, mapping.host, length, words, into.nbits, TARGET_PAGE_BITS
            )
            if result == -errno.ENOTTY:  # before Linux 6.7
                into.fill()
            elif result < 0:
                raise GuestMemoryError(-result, f"scanning {mapping!r}")
    finally:
        os.close(fd)


def populated_by_file(fd: int, length: int, into: Bitmap) -> None:
    """Set the bits of pages that a file that is no hugetlbfs file has data for."""
    for start, end in data_ranges(fd, length):
        into.set(*touched_pages(start, end - start))


def data_ranges(fd: int, length: int, unit: int = 1) -> Iterator[tuple[int, int]]:
    """``(start, end)`` of the parts of a file that have data, widened to whole ``unit`` bytes (a
    power of two) and up to ``length``; no two overlap. Not for hugetlbfs."""
    position = 0
    while position < length:
        try:
            start = os.lseek(fd, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        if start >= length:
            return
        end = min(length, align_up(os.lseek(fd, start, os.SEEK_HOLE), unit))
        yield max(position, align_down(start, unit)), end
        position = end
