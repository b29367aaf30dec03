"""PAGEMAP_SCAN over every kind of memory that can be tracked."""

import os
import tempfile
from collections.abc import Callable

from scripts.validate import raw
from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.cases.scanargs import ASYNC
from scripts.validate.check import Skipped, expect, same
from scripts.validate.host import Need, feature, hugepages, thp
from scripts.validate.kinds import ANON, HUGE, PAGE, SHMEM, aligned
from scripts.validate.tracking import CHECK, PROTECT, Tracked
from uffd import Advice, Feature, Mapping, touch

_SHM_HUGETLB, _IPC_CREAT, _IPC_RMID = 0o4000, 0o1000, 0
_MAP_ANONYMOUS_HUGETLB = 0x02 | 0x20 | 0x40000


def _thp() -> Mapping:
    memory = aligned(2 * HUGE, HUGE)
    memory.advise(Advice.HUGEPAGE)
    return memory


def _hugetlb_anonymous() -> Mapping:
    length = 4 * HUGE
    address = raw.map_memory(0, length, 3, _MAP_ANONYMOUS_HUGETLB)
    return Mapping(address, length, page_size=HUGE, fd=None, is_shared=False)


def _hugetlb_sysv() -> Mapping:
    length = 4 * HUGE
    key = raw.syscall(raw.SYS_SHMGET, 0, length, _SHM_HUGETLB | _IPC_CREAT | 0o600)
    if key < 0:
        raise Skipped(f"no SysV shared memory of huge pages: {os.strerror(-key)}")
    address = raw.syscall(raw.SYS_SHMAT, key, 0, 0)
    raw.syscall(raw.SYS_SHMCTL, key, _IPC_RMID, 0)  # goes with its last user
    expect(address > 0, "shmat")
    return Mapping(address, length, page_size=HUGE, fd=None, is_shared=True)


def _file() -> Mapping:
    fd, name = tempfile.mkstemp(prefix="validate-kernel-")
    os.unlink(name)
    os.ftruncate(fd, 16 * PAGE)
    os.pwrite(fd, bytes([3]) * (16 * PAGE), 0)
    return Mapping.of_file(fd, 16 * PAGE)


_MEMORIES: dict[str, Callable[[], Mapping]] = {
    "base pages": lambda: ANON.map(16),
    "large area": lambda: ANON.map(4 << 10),
    "THP": _thp,
    "hugetlb memfd": lambda: Mapping.memfd(4 * HUGE, hugepage_size=HUGE),
    "hugetlb anonymous": _hugetlb_anonymous,
    "hugetlb SysV": _hugetlb_sysv,
    "file": _file,
    "memfd": lambda: SHMEM.map(16),
}


def _needs(variant: str) -> list[Need]:
    if variant.startswith("hugetlb"):
        return [hugepages(), feature(Feature.WP_HUGETLBFS_SHMEM)]
    return [thp()] if variant == "THP" else []


def _tracked(bench: Bench) -> Tracked:
    return Tracked.of(_MEMORIES[bench.variant]())


@case("scan", on=_MEMORIES, needs=[ASYNC], needs_of=_needs, name="all-clean")
def all_clean(bench: Bench) -> None:
    """After protecting, nothing is written."""
    _tracked(bench).expect_written([], "written pages")


@case("scan", on=_MEMORIES, needs=[ASYNC], needs_of=_needs, name="all-written")
def all_written(bench: Bench) -> None:
    """Every page written: one region, the whole range."""
    tracked = _tracked(bench)
    tracked.write(*range(tracked.count))
    tracked.expect_written([(0, tracked.count)], "written pages")


@case("scan", on=_MEMORIES, needs=[ASYNC], needs_of=_needs, name="all-but-ends")
def all_but_ends(bench: Bench) -> None:
    """All but the first and the last page written."""
    tracked = _tracked(bench)
    tracked.write(*range(1, tracked.count - 1))
    tracked.expect_written([(1, tracked.count - 1)], "written pages")


@case("scan", on=_MEMORIES, needs=[ASYNC], needs_of=_needs, name="protect-while-reading")
def protect_while_reading(bench: Bench) -> None:
    """Get-and-protect returns what was written and leaves it clean; contents stay."""
    tracked = _tracked(bench)
    tracked.write(*range(tracked.count))
    same(tracked.written(PROTECT | CHECK), [(0, tracked.count)], "first look")
    tracked.expect_written([], "second look")
    values = {touch.load(tracked.at(i)) for i in range(tracked.count)}
    same(values, {0x5A}, "bytes written")


@case("scan", on=_MEMORIES, needs=[ASYNC], needs_of=_needs, name="only-middle")
def only_middle(bench: Bench) -> None:
    """Only the middle page written."""
    tracked = _tracked(bench)
    middle = tracked.count // 2
    tracked.write(middle)
    tracked.expect_written([(middle, middle + 1)], "written pages")


@case("scan", on=_MEMORIES, needs=[ASYNC], needs_of=_needs, name="two-middle")
def two_middle(bench: Bench) -> None:
    """Two pages with one between them written: two regions."""
    tracked = _tracked(bench)
    first = tracked.count // 2 - 1
    tracked.write(first, first + 2)
    expected = [(first, first + 1), (first + 2, first + 3)]
    tracked.expect_written(expected, "written pages")
