"""RAMBlock: one named stretch of guest RAM: made, resized, discarded, looked at without a touch.

What its jobs have in modules of their own, from the bottom up: touching (``access``), mappings
(``blockmemory``), memory that other processes have too (``blockshare``).
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Self

from guestmem.backings import Backing, Source, open_source
from guestmem.bitmap import Bitmap
from guestmem.blockmemory import map_source
from guestmem.blockshare import SharedMemory
from guestmem.discard import drop
from guestmem.geometry import (
    TARGET_PAGE_BYTES,
    align_down,
    align_up,
    is_aligned,
    target_pages,
    target_pages_per,
)
from guestmem.mapping import Mapping
from guestmem.numa import NumaPolicy
from guestmem.residency import (
    is_mapped_page,
    is_page_in_file,
    populated_by_file,
    populated_by_mappings,
)
from guestmem.smaps import MappingReport, report

IDSTR_MAX_BYTES = 255


class RAMBlock(SharedMemory):
    """A block of guest RAM. Made by :meth:`allocate`, ended by :meth:`close`.

    :ivar idstr: its name on the wire, 1..255 bytes of UTF-8.
    :ivar host: address of its first byte in our address space; aligned to the host page, and to
        2 MiB if the block is that long, so that transparent huge pages can form.
    :ivar used_length: bytes in use; bounds of every access. Multiple of the target page.
    :ivar max_length: bytes mapped; ceiling of :meth:`resize`. Multiple of ``page_size``.
    :ivar page_size: bytes of a host page: what the host maps, faults and places as one.
    :ivar fd: the file behind it, or ``None`` for private memory. The block owns it.
    :ivar policy: where its pages come from; ``None``: as the process's policy says.
    :ivar was_preallocated: every page was populated at the start.

    Threads: accessors, :meth:`discard` and the queries may run at once from any threads (what two
    writers leave in one place is up to the hardware). :meth:`resize`, :meth:`add_alias` and
    :meth:`close` must not run at the same time as anything else on the block.
    """

    __slots__ = ("_discard_watchers",)

    def __init__(
        self, idstr: str, used_length: int, backing: Backing, source: Source, mapping: Mapping
    ) -> None:
        """For :meth:`allocate`. The block owns ``source.fd`` and ``mapping`` from here on."""
        super().__init__(idstr, used_length, backing, source, mapping)
        self._discard_watchers: list[Callable[[int, int], None]] = []

    @classmethod
    def allocate(
        cls,
        idstr: str,
        length: int,
        *,
        backing: Backing = Backing.ANON,
        hugepage_size: int | None = None,
        path: str | None = None,
        max_length: int | None = None,
        policy: NumaPolicy | None = None,
        is_reserved: bool = True,
    ) -> Self:
        """Map a new block of ``length`` bytes that read as zero (FILE: as the file's contents).

        :param length: bytes; a positive multiple of the target page.
        :param hugepage_size: HUGETLB: bytes of one page, 2 MiB unless told. FILE: insist on this
            page size; ``None`` takes the file system's.
        :param path: FILE only: a directory (a nameless file is made in it), or a file. A missing
            one is made and stays; an existing one keeps its contents and must be long enough.
        :param max_length: room to grow to, at least ``length``.
        :param policy: NUMA nodes for its pages, given before the first one exists.
        :param is_reserved: False: huge pages are not promised beforehand; the pool may run dry.
        :raises ValueError: a bad name, length or combination.
        :raises HugepagesShort: not enough free huge pages; says how many and what to do.
        :raises PageSizeMismatch: the file's pages are smaller (or larger) than asked for.
        :raises GuestMemoryError: anything else the kernel refuses. Nothing is left open or mapped.
        """
        _check_idstr(idstr)
        room = length if max_length is None else max_length
        if length <= 0 or not is_aligned(length, TARGET_PAGE_BYTES) or room < length:
            raise ValueError(f"block {idstr!r} of {length} bytes, at most {room}")
        what = f"block {idstr!r}"
        source = open_source(backing, room, what=what, hugepage_size=hugepage_size, path=path)
        source = dataclasses.replace(source, is_reserved=is_reserved)
        try:
            mapping = map_source(source, what)
        except BaseException:
            if source.fd is not None:
                os.close(source.fd)
            raise
        block = cls(idstr, length, backing, source, mapping)
        if policy is not None:
            try:
                block.set_policy(policy)
            except BaseException:
                block.close()
                raise
        return block

    def __repr__(self) -> str:
        state = f"{self.host:#x}+{self.used_length:#x}" if self._source else "closed"
        return f"<RAMBlock {self.idstr!r} {self.backing.value} {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def page_count(self) -> int:
        """Target pages in use."""
        return target_pages(self.used_length)

    @property
    def placed_length(self) -> int:
        """``used_length`` rounded up to whole host pages: what can be registered and placed."""
        return align_up(self.used_length, self.page_size)

    def discard(self, offset: int, length: int) -> None:
        """Throw pages away: they read as zero, or fault again where a userfaultfd watches.

        Gone from every mapping and from the file. Huge pages go back to the pool but stay
        promised to this block. No userfaultfd event is raised for shared memory (the kernel
        raises none for a punched hole).

        :param offset, length: multiples of ``page_size``, inside :attr:`placed_length`. Less than
            a huge page is refused because the kernel would quietly do nothing, or only zero it.
        :raises ValueError: not aligned, or outside the block.
        :raises HugepagesShort: somebody else took the huge pages the moment they were free.
        :raises GuestMemoryError: with the kernel's errno (``EINVAL`` for locked private memory).
        """
        source = self._open()
        where = f"discarding [{offset:#x}, {offset + length:#x}) of block {self.idstr!r}"
        if not (is_aligned(offset, self.page_size) and is_aligned(length, self.page_size)):
            raise ValueError(f"{where}: not whole host pages of {self.page_size:#x} bytes")
        if offset < 0 or length < 0 or offset + length > self.placed_length:
            raise ValueError(f"{where}: outside its {self.placed_length:#x} bytes")
        if length:
            drop(source, self.mappings, offset, length, where)
            for watcher in tuple(self._discard_watchers):
                watcher(offset, length)

    def watch_discards(self, watcher: Callable[[int, int], None]) -> None:
        """Have ``watcher(offset, length)`` called after each discard, on the discarding thread."""
        self._discard_watchers.append(watcher)

    def unwatch_discards(self, watcher: Callable[[int, int], None]) -> None:
        """Undo :meth:`watch_discards`."""
        self._discard_watchers.remove(watcher)

    def resize(self, used_length: int) -> None:
        """Change ``used_length``, up to ``max_length``. Bytes given up read as zero when regained.

        :param used_length: bytes; positive multiple of the target page.
        :raises ValueError: too long, or not whole target pages.
        """
        self._open()
        if not 0 < used_length <= self.max_length or used_length % TARGET_PAGE_BYTES:
            raise ValueError(
                f"block {self.idstr!r}: {used_length} bytes of at most {self.max_length}"
            )
        if used_length < self.used_length:
            kept = align_up(used_length, self.page_size)
            self.fill(used_length, min(kept, self.used_length) - used_length, 0)
            self.discard(kept, self.placed_length - kept)
        self.used_length = used_length

    # -- looking without touching -------------------------------------------------------------

    def is_resident(self, offset: int) -> bool:
        """Does the host page at ``offset`` exist? Looks only, never faults.

        Private memory: the page is in memory or in swap. Shared small pages: the file has it,
        mapped here or not. Huge pages: mapped by this mapping or an alias; the kernel has no way
        to ask for a huge page that is in the file but mapped nowhere here.
        """
        source = self._open()
        address = self._address(offset, 1)
        offset = align_down(address - self.host, self.page_size)
        if source.fd is None or source.is_hugetlb:
            return any(is_mapped_page(mapping.host + offset) for mapping in self._mappings)
        return is_page_in_file(source.fd, offset)

    def populated(self, *, whole_pages: bool = False) -> Bitmap:
        """A bit per target page: clear where the page certainly reads as zero, having never been
        written or been discarded. Reading such pages would make the kernel allocate them.

        Looks only, never faults; a page written meanwhile may be missed, so start dirty tracking
        first. All bits are set where the kernel cannot tell (hugetlbfs files with a path, which
        others may have filled; private memory before Linux 6.7).

        :param whole_pages: up to :attr:`placed_length`, a host page with one bit has all.
        :raises GuestMemoryError: the kernel refused the scan.
        """
        source = self._open()
        length = self.placed_length if whole_pages else self.used_length
        bitmap = Bitmap(target_pages(length))
        if source.is_hugetlb and self.backing is Backing.FILE:
            bitmap.fill()
        elif source.fd is None or source.is_hugetlb:
            populated_by_mappings(self.mappings, self.placed_length, bitmap)
        else:
            populated_by_file(source.fd, length, bitmap)
        if whole_pages:
            bitmap.widen(target_pages_per(self.page_size))
        return bitmap

    def reports(self) -> Iterator[MappingReport]:
        """What ``/proc/self/smaps`` says of each mapping, in the order of :attr:`mappings`."""
        self._open()
        return (report(mapping.host, mapping.length) for mapping in self._mappings)


def _check_idstr(idstr: str) -> None:
    if not 1 <= len(idstr.encode()) <= IDSTR_MAX_BYTES:
        raise ValueError(f"a block's name has 1 to {IDSTR_MAX_BYTES} bytes, not {idstr!r}")
