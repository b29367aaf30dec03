"""Throwing pages away so that they are really gone: from the file, and from every mapping."""

import errno
import mmap
from collections.abc import Sequence

from guestmem._native import ffi, lib
from guestmem.backings import Source
from guestmem.errors import check
from guestmem.mapping import Mapping
from guestmem.shortage import explain_shortage


def drop(source: Source, mappings: Sequence[Mapping], offset: int, length: int, where: str) -> None:
    """:param where: begins the error's sentence. Errors: those of ``RAMBlock.discard``."""
    if source.fd is None:
        mappings[0].advise(mmap.MADV_DONTNEED, offset, length, what=where)
        return
    # MADV_DONTNEED on a shared mapping would only drop our page table entries: the data
    # stays in the file, and the next touch is a minor fault on stale contents.
    mode = lib.FALLOC_FL_PUNCH_HOLE | lib.FALLOC_FL_KEEP_SIZE
    check(lib.mem_fallocate(source.fd, mode, offset, length), where)
    if source.is_hugetlb:
        if source.is_reserved:
            _reserve_again(source, source.fd, offset, length, where)
        return
    for mapping in mappings:
        # A hole leaves the poison of a migration that was given up in the page tables.
        mapping.advise(mmap.MADV_DONTNEED, offset, length, what=where)


def _reserve_again(source: Source, fd: int, offset: int, length: int, where: str) -> None:
    """A hole punched in hugetlb gives up its reservation too. Reservations of a shared file
    belong to the file, so mapping the range once makes a new one that outlives the mapping.
    """
    out = ffi.new("uint64_t *")
    result = lib.mem_map(0, length, 0, mmap.MAP_SHARED, fd, offset, out)
    if result == -errno.ENOMEM and (short := explain_shortage(where, source.page_size, length)):
        raise short
    check(result, where)
    check(lib.mem_unmap(out[0], length), where)
