"""RAMBlock: one named stretch of guest RAM, its mappings and what is behind them."""

import contextlib
import dataclasses
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Self

from guestmem._native import ffi, lib
from guestmem.access import BlockAccess
from guestmem.backings import Backing, Source, check_memfd, open_source
from guestmem.bitmap import Bitmap
from guestmem.errors import GuestMemoryError, check
from guestmem.geometry import (
    TARGET_PAGE_BYTES,
    THP_BYTES,
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
from guestmem.shortage import explain_shortage
from guestmem.smaps import MappingReport, report

IDSTR_MAX_BYTES = 255
# Advice that throws contents away behind the bitmaps' back; discard() is the way.
_DISCARDING = frozenset({mmap.MADV_DONTNEED, mmap.MADV_FREE, mmap.MADV_REMOVE})


class RAMBlock(BlockAccess):
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

    __slots__ = (
        "_discard_watchers",
        "_mappings",
        "_source",
        "_thp",
        "backing",
        "max_length",
        "page_size",
        "policy",
        "was_preallocated",
    )

    def __init__(
        self, idstr: str, used_length: int, backing: Backing, source: Source, mapping: Mapping
    ) -> None:
        """For :meth:`allocate`. The block owns ``source.fd`` and ``mapping`` from here on."""
        super().__init__(idstr, mapping.host, used_length)
        self.backing = backing
        self.max_length = source.length
        self.page_size = source.page_size
        self._source: Source | None = source
        self._mappings = [mapping]
        self.policy: NumaPolicy | None = None
        self.was_preallocated = False
        self._thp: bool | None = None
        check(lib.access_install(), "catching SIGBUS")
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
            mapping = _map(source, what)
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

    # -- what it is ---------------------------------------------------------------------------

    @property
    def fd(self) -> int | None:
        """The file behind the block (close-on-exec, owned by the block), ``None`` if private."""
        return self._open().fd

    @property
    def is_shared(self) -> bool:
        """Do all mappings of the block see one memory? False for private anonymous memory."""
        return self._open().fd is not None

    @property
    def is_hugetlb(self) -> bool:
        """Is it made of huge pages from a pool?"""
        return self._open().is_hugetlb

    @property
    def is_reserved(self) -> bool:
        """Are its huge pages promised beforehand? True for memory without a pool, too."""
        return self._open().is_reserved

    @property
    def page_count(self) -> int:
        """Target pages in use."""
        return target_pages(self.used_length)

    @property
    def placed_length(self) -> int:
        """``used_length`` rounded up to whole host pages: what can be registered and placed."""
        return align_up(self.used_length, self.page_size)

    @property
    def mappings(self) -> tuple[Mapping, ...]:
        """Every mapping of the block: the one at ``host`` first, then the aliases."""
        return tuple(self._mappings)

    # -- changing what is behind it -----------------------------------------------------------

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
            self._discard(source, offset, length, where)
            for watcher in tuple(self._discard_watchers):
                watcher(offset, length)

    def watch_discards(self, watcher: Callable[[int, int], None]) -> None:
        """Have ``watcher(offset, length)`` called after each discard, on the discarding thread."""
        self._discard_watchers.append(watcher)

    def unwatch_discards(self, watcher: Callable[[int, int], None]) -> None:
        """Undo :meth:`watch_discards`."""
        self._discard_watchers.remove(watcher)

    def _discard(self, source: Source, offset: int, length: int, where: str) -> None:
        if source.fd is None:
            self._mappings[0].advise(mmap.MADV_DONTNEED, offset, length, what=where)
            return
        # MADV_DONTNEED on a shared mapping would only drop our page table entries: the data
        # stays in the file, and the next touch is a minor fault on stale contents.
        mode = lib.FALLOC_FL_PUNCH_HOLE | lib.FALLOC_FL_KEEP_SIZE
        check(lib.mem_fallocate(source.fd, mode, offset, length), where)
        if source.is_hugetlb:
            if source.is_reserved:
                self._reserve_again(source.fd, offset, length, where)
            return
        for mapping in self._mappings:
            # A hole leaves the poison of a migration that was given up in the page tables.
            mapping.advise(mmap.MADV_DONTNEED, offset, length, what=where)

    def _reserve_again(self, fd: int, offset: int, length: int, where: str) -> None:
        """A hole punched in hugetlb gives up its reservation too. Reservations of a shared file
        belong to the file, so mapping the range once makes a new one that outlives the mapping.
        """
        out = ffi.new("uint64_t *")
        result = lib.mem_map(0, length, 0, mmap.MAP_SHARED, fd, offset, out)
        if result == -errno.ENOMEM and (short := explain_shortage(where, self.page_size, length)):
            raise short
        check(result, where)
        check(lib.mem_unmap(out[0], length), where)

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

    @property
    def thp(self) -> bool | None:
        """What :meth:`set_thp` said last; ``None``: the host's default."""
        return self._thp

    def set_thp(self, enabled: bool) -> None:
        """Let transparent huge pages form (``MADV_HUGEPAGE``) or not, on **every** mapping.

        Aliases made later follow. Pages that are huge already stay so until they are discarded.
        No effect on hugetlb. Off must come before pages are placed one by one: one huge page
        formed by the kernel would cover, with zeros, pages that have not arrived.

        :raises GuestMemoryError: ``EINVAL`` when switched on in a kernel built without.
        """
        self._open()
        for mapping in self._mappings:
            _set_thp(mapping, enabled, f"block {self.idstr!r}")
        self._thp = enabled

    def advise(self, advice: int, offset: int = 0, length: int | None = None) -> None:
        """madvise(2) on every mapping of the block, for a part or all of it.

        :raises ValueError: advice that discards (see :meth:`discard`), or outside the block.
        :raises GuestMemoryError: with the kernel's errno.
        """
        self._open()
        if advice in _DISCARDING:
            raise ValueError("advice that discards pages: use discard()")
        length = self.max_length - offset if length is None else length
        if offset < 0 or length < 0 or offset + length > self.max_length:
            raise ValueError(
                f"block {self.idstr!r}: advice for [{offset:#x}, {offset + length:#x})"
            )
        for mapping in self._mappings:
            mapping.advise(advice, offset, length, what=f"block {self.idstr!r}")

    def set_policy(self, policy: NumaPolicy) -> None:
        """Take pages from these NUMA nodes from now on; those that exist are moved there.

        :raises GuestMemoryError: see :meth:`guestmem.numa.NumaPolicy.apply`.
        """
        self._open()
        for mapping in self._mappings:
            policy.apply(mapping.host, mapping.length, f"block {self.idstr!r}")
        self.policy = policy

    def add_alias(self) -> Mapping:
        """Map the whole block a second time; the block closes the mapping with itself.

        :raises ValueError: private memory has no second view.
        :raises GuestMemoryError: with mmap(2)'s errno.
        """
        source = self._open()
        if source.fd is None:
            raise ValueError(f"block {self.idstr!r} is private memory: it cannot be mapped twice")
        alias = _map(source, f"alias of block {self.idstr!r}")
        if self.policy is not None:
            self.policy.apply(alias.host, alias.length, f"alias of block {self.idstr!r}")
        if self._thp is not None:
            _set_thp(alias, self._thp, f"alias of block {self.idstr!r}")
        self._mappings.append(alias)
        return alias

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

    def _map_everywhere(self, source: Source, fd: int, what: str) -> None:
        for mapping in self._mappings:
            mapping.replace(source.map_flags, fd, what=what)
            if self._thp is not None:
                _set_thp(mapping, self._thp, what)

    def remove_alias(self, alias: Mapping) -> None:
        """Unmap what :meth:`add_alias` returned. :raises ValueError: not an alias of this block."""
        if alias not in self._mappings[1:]:
            raise ValueError(f"{alias!r} is no alias of block {self.idstr!r}")
        self._mappings.remove(alias)
        alias.close()

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

    def close(self) -> None:
        """Unmap everything and close the file. Harmless the second time.

        Join every thread that touches the block first: later touches are SIGSEGV.
        """
        source, self._source = self._source, None
        if source is None:
            return
        self.host = 0
        lib.access_uninstall()
        while self._mappings:
            self._mappings.pop().close()
        if source.fd is not None:
            os.close(source.fd)

    def _open(self) -> Source:
        if self._source is None:
            raise ValueError(f"block {self.idstr!r} is closed")
        return self._source


def _check_idstr(idstr: str) -> None:
    if not 1 <= len(idstr.encode()) <= IDSTR_MAX_BYTES:
        raise ValueError(f"a block's name has 1 to {IDSTR_MAX_BYTES} bytes, not {idstr!r}")


def _map(source: Source, what: str) -> Mapping:
    # Address and offset congruent modulo 2 MiB: else no huge page can ever form.
    alignment = max(source.page_size, THP_BYTES if source.length >= THP_BYTES else 0)
    fd = -1 if source.fd is None else source.fd
    try:
        return Mapping(source.length, alignment=alignment, flags=source.map_flags, fd=fd, what=what)
    except GuestMemoryError as error:
        if error.errno == errno.ENOMEM and source.is_hugetlb:
            short = explain_shortage(what, source.page_size, source.length)
            if short is not None:
                raise short from None
        raise


def _set_thp(mapping: Mapping, enabled: bool, what: str) -> None:
    try:
        mapping.advise(mmap.MADV_HUGEPAGE if enabled else mmap.MADV_NOHUGEPAGE, what=what)
    except GuestMemoryError as error:
        # A kernel without transparent huge pages has nothing to switch off.
        if enabled or error.errno != errno.EINVAL:
            raise
