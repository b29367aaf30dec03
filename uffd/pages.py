"""Looking at page tables: mincore, pagemap entries, PAGEMAP_SCAN, PROCMAP_QUERY.

None of these faults a page in or sleeps on a missing one.
"""

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from enum import KEEP, IntFlag
from types import TracebackType
from typing import Self

from uffd._native import ffi, lib
from uffd.errors import check

PAGE_BYTES: int = os.sysconf("SC_PAGESIZE")


def mincore(address: int, length: int) -> bytes:
    """One byte per base page, 1 = resident. Pages of a shared file count although unmapped.

    :raises OutOfMemory: part of the range is not mapped.
    """
    count = -(-length // PAGE_BYTES)
    vector = ffi.new("uint8_t[]", max(count, 1))
    check(lib.mem_mincore(address, length, vector), "mincore", address=address, length=length)
    return bytes(byte & 1 for byte in bytes(ffi.buffer(vector, count)))


def is_resident(address: int, length: int) -> bool:
    """Whether every base page of the range is resident. Swapped-out pages are not."""
    result = lib.mem_resident(address, length)
    return bool(check(result, "mincore", address=address, length=length))


_NAME_BYTES = 4 << 10  # of a mapped file: PATH_MAX


@dataclass(frozen=True, slots=True)
class PagemapEntry:
    """One 8-byte entry of ``/proc/PID/pagemap``."""

    raw: int

    def _bit(self, index: int) -> bool:
        return bool(self.raw >> index & 1)

    @property
    def is_present(self) -> bool:
        return self._bit(63)

    @property
    def is_swapped(self) -> bool:
        """Swapped out, or a marker (write-protected hole, poison, guard)."""
        return self._bit(62)

    @property
    def is_file_or_shared(self) -> bool:
        return self._bit(61)

    @property
    def is_guard(self) -> bool:
        return self._bit(58)

    @property
    def is_write_protected(self) -> bool:
        """By userfaultfd (7.3: or read/write-protected)."""
        return self._bit(57)

    @property
    def is_exclusive(self) -> bool:
        return self._bit(56)

    @property
    def is_soft_dirty(self) -> bool:
        """Needs CONFIG_MEM_SOFT_DIRTY; without it the bit is simply never set."""
        return self._bit(55)

    @property
    def frame_number(self) -> int | None:
        """``None`` when absent; 0 without CAP_SYS_ADMIN."""
        return self.raw & ((1 << 55) - 1) if self.is_present else None


class Category(IntFlag, boundary=KEEP):
    """PAGEMAP_SCAN's page categories."""

    NONE = 0
    WPALLOWED = 1 << 0  # the mapping is write-protect registered with WP_ASYNC
    WRITTEN = 1 << 1  # mask by WPALLOWED: on 6.18 every unprotected page anywhere counts as written
    FILE = 1 << 2
    PRESENT = 1 << 3
    SWAPPED = 1 << 4  # markers too
    PFNZERO = 1 << 5
    HUGE = 1 << 6
    SOFT_DIRTY = 1 << 7
    GUARD = 1 << 8  # 6.15
    ACCESSED = 1 << 9  # 7.3, RWP mappings


class ScanFlag(IntFlag):
    NONE = 0
    WP_MATCHING = 1  # protect what matched, atomically per page
    CHECK_WPASYNC = 2  # EPERM if a mapping in the range is not in asynchronous mode


@dataclass(frozen=True, slots=True)
class PageRegion:
    """Neighbouring pages of equal categories: [start, end)."""

    start: int
    end: int
    categories: Category

    @property
    def length(self) -> int:
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class ScanResult:
    """Regions found, and where the walk stopped; complete when ``walk_end`` is the asked end."""

    regions: tuple[PageRegion, ...]
    walk_end: int


class Pagemap:
    """An open ``/proc/PID/pagemap``; a context manager. Any thread."""

    def __init__(self, pid: int | None = None) -> None:
        """:raises OSError: no such process, or no ptrace-read rights over it."""
        name = "self" if pid is None else str(pid)
        self._fd = os.open(f"/proc/{name}/pagemap", os.O_RDONLY | os.O_CLOEXEC)

    def fileno(self) -> int:
        if self._fd < 0:
            raise ValueError("the pagemap is closed")
        return self._fd

    def close(self) -> None:
        fd, self._fd = self._fd, -1
        if fd >= 0:
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

    def entries(self, address: int, count: int) -> list[PagemapEntry]:
        """``count`` entries, one per base page, from the page that holds ``address``."""
        raw = ffi.new("uint64_t[]", max(count, 1))
        got = lib.pagemap_read(self.fileno(), address, PAGE_BYTES, raw, count)
        check(got, "pagemap", address=address, length=count * PAGE_BYTES)
        return [PagemapEntry(raw[i]) for i in range(got)]

    def scan(
        self,
        start: int,
        end: int,
        *,
        mask: Category = Category.NONE,
        any_of: Category = Category.NONE,
        inverted: Category = Category.NONE,
        returned: Category = Category.NONE,
        flags: ScanFlag = ScanFlag.NONE,
        max_regions: int = 1024,
        max_pages: int = 0,
    ) -> ScanResult:
        """One PAGEMAP_SCAN (Linux 6.7).

        A page matches when (its categories XOR ``inverted``) has all of ``mask`` and, if nonzero,
        any of ``any_of``. ``returned`` picks which categories are shown.

        :param max_regions: 0 together with WP_MATCHING protects without output.
        :param max_pages: stop after this many matching pages; 0 is no limit.
        :raises NotPermitted: CHECK_WPASYNC, and a mapping is not in asynchronous write-protect
            mode.
        :raises InvalidRequest: a flag or category this kernel does not know.
        """
        arguments = ffi.new(
            "struct pagemap_scan_args *",
            {
                "flags": int(flags),
                "start": start,
                "end": end,
                "max_pages": max_pages,
                "category_inverted": int(inverted),
                "category_mask": int(mask),
                "category_anyof_mask": int(any_of),
                "return_mask": int(returned),
            },
        )
        regions = ffi.new("struct pagemap_region[]", max_regions) if max_regions else ffi.NULL
        walk_end = ffi.new("uint64_t *")
        got = lib.pagemap_scan(self.fileno(), arguments, regions, max_regions, walk_end)
        check(got, "PAGEMAP_SCAN", address=start, length=end - start)
        found = tuple(
            PageRegion(regions[i].start, regions[i].end, Category(regions[i].categories))
            for i in range(got)
        )
        return ScanResult(found, walk_end[0])

    def written_and_protect(self, start: int, end: int) -> Iterator[PageRegion]:
        """The pages written since the last time, write-protected again in the same step per page.

        For a range registered WP on a WP_ASYNC context: the loop of dirty tracking. The first
        call marks everything clean (and yields everything). Read a page's bytes *after* its
        region was yielded.

        :raises NotPermitted: a mapping in the range is not in asynchronous write-protect mode.
        """
        at = start
        while at < end:
            result = self.scan(
                at,
                end,
                mask=Category.WRITTEN,
                returned=Category.WRITTEN,
                flags=ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC,
            )
            yield from result.regions
            at = result.walk_end


class MappingFlag(IntFlag, boundary=KEEP):
    """PROCMAP_QUERY's flags: what a mapping is, and which mappings match."""

    NONE = 0
    READABLE = 1
    WRITABLE = 2
    EXECUTABLE = 4
    SHARED = 8
    COVERING_OR_NEXT = 0x10
    FILE_BACKED = 0x20


@dataclass(frozen=True, slots=True)
class MappingInfo:
    """One mapping of a process: [start, end), its host page in bytes, its file."""

    start: int
    end: int
    flags: MappingFlag
    page_size: int
    offset: int
    inode: int
    device: tuple[int, int]
    name: str


def query_mapping(
    address: int, *, pid: int | None = None, flags: MappingFlag = MappingFlag.NONE
) -> MappingInfo | None:
    """The mapping that covers ``address`` (PROCMAP_QUERY, Linux 6.11); ``None`` when nothing
    matches.

    :param flags: wanted properties; COVERING_OR_NEXT also takes the next mapping behind it.
    :raises UffdError: ENOTTY on older kernels.
    """
    fd = os.open(f"/proc/{'self' if pid is None else pid}/maps", os.O_RDONLY | os.O_CLOEXEC)
    try:
        info, name = ffi.new("struct procmap_info *"), ffi.new("char[]", _NAME_BYTES)
        result = lib.procmap_query(fd, address, int(flags), name, _NAME_BYTES, info)
    finally:
        os.close(fd)
    if result == -errno.ENOENT:
        return None
    check(result, "PROCMAP_QUERY", address=address)
    text = bytes(ffi.buffer(name, _NAME_BYTES)).split(b"\0", 1)[0]
    return MappingInfo(
        start=info.start,
        end=info.end,
        flags=MappingFlag(info.flags),
        page_size=info.page_size,
        offset=info.offset,
        inode=info.inode,
        device=(info.dev_major, info.dev_minor),
        name=os.fsdecode(text),
    )
