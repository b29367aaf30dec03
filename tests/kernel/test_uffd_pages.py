"""Advice, memory files and page tables, as the kernel really answers."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator

import pytest

from tests.support.need import need
from tests.support.uffd_kernel import need_dontneed
from tests.support.uffd_memory import (
    HUGE,
    MEMORY_TYPES,
    PAGE,
    memory,
    need_feature,
    open_uffd,
    pattern,
)
from uffd import (
    Advice,
    Feature,
    InvalidRequest,
    Mapping,
    MappingFlag,
    OutOfMemory,
    Pagemap,
    ProcessGone,
    Seal,
    UffdError,
    file_system,
    is_resident,
    madvise,
    memfd_create,
    mincore,
    pidfd_open,
    process_madvise,
    punch_hole,
    query_mapping,
)
from uffd.files import MemfdFlag, add_seals, allocate, get_seals

pytestmark = pytest.mark.kernel

every_memory = pytest.mark.parametrize("region", MEMORY_TYPES, indirect=True)

# What Linux 6.18 accepts where: advice -> memory types that answer EINVAL.
REFUSED = {
    Advice.FREE: {"shmem", "shmem-private", "hugetlb", "hugetlb-private"},
    Advice.COLD: {"hugetlb", "hugetlb-private"},
    Advice.PAGEOUT: {"hugetlb", "hugetlb-private"},
    Advice.GUARD_INSTALL: {"hugetlb", "hugetlb-private"},
    Advice.WIPEONFORK: {"shmem", "shmem-private", "hugetlb", "hugetlb-private"},
}

NEWER = {
    Advice.POPULATE_READ: "5.14",
    Advice.POPULATE_WRITE: "5.14",
    Advice.GUARD_INSTALL: "6.13",
    Advice.GUARD_REMOVE: "6.13",
}


@pytest.fixture
def region(request: pytest.FixtureRequest) -> Iterator[Mapping]:
    with memory(getattr(request, "param", "anon")) as mapping:
        yield mapping


@pytest.mark.parametrize("kind", MEMORY_TYPES)
@pytest.mark.parametrize(
    "advice",
    [
        Advice.NORMAL,
        Advice.DONTNEED,
        Advice.FREE,
        Advice.DONTFORK,
        Advice.DOFORK,
        Advice.MERGEABLE,
        Advice.UNMERGEABLE,
        Advice.HUGEPAGE,
        Advice.NOHUGEPAGE,
        Advice.DONTDUMP,
        Advice.WIPEONFORK,
        Advice.COLD,
        Advice.PAGEOUT,
        Advice.GUARD_INSTALL,
        Advice.GUARD_REMOVE,
        Advice.POPULATE_READ,
        Advice.POPULATE_WRITE,
    ],
)
def test_advice_on_every_memory(kind: str, advice: Advice) -> None:
    with memory(kind) as region:
        if advice is Advice.DONTNEED:
            need_dontneed(region)
        if kind in REFUSED.get(advice, set()):
            with pytest.raises(InvalidRequest) as caught:
                region.advise(advice)
            assert caught.value.operation == f"madvise {advice.name}"
        elif advice is Advice.GUARD_REMOVE and kind.startswith("hugetlb"):
            with pytest.raises(InvalidRequest):
                region.advise(advice)
        elif advice is Advice.DOFORK and kind.startswith("hugetlb"):
            with contextlib.suppress(InvalidRequest):  # 7.3 refuses it, 6.18 does not
                region.advise(advice)
        elif advice in NEWER:
            try:
                region.advise(advice)
            except InvalidRequest:
                need(False, f"no {advice.name} before Linux {NEWER[advice]}")
        else:
            region.advise(advice)


@every_memory
def test_dontneed_empties_private_and_only_unmaps_shared(region: Mapping) -> None:
    need_dontneed(region)
    region.write(0, pattern(region))
    region.advise(Advice.DONTNEED)
    if region.fd is None:
        assert region.load(0) == 0
    elif region.is_shared:
        assert region.load(0) == 1
    else:  # the private copy is gone, the file below never had it
        assert region.load(0) == 0


@pytest.mark.parametrize("region", ["hugetlb"], indirect=True)
def test_dontneed_rounds_a_short_hugetlb_length_down_to_nothing(region: Mapping) -> None:
    need_dontneed(region)
    with open_uffd() as uffd:
        uffd.register(region)
        uffd.copy(region.address, pattern(region))
        madvise(region.address, HUGE - PAGE, Advice.DONTNEED)
        with Pagemap() as pagemap:
            assert pagemap.entries(region.address, 1)[0].is_present
        with pytest.raises(InvalidRequest):
            madvise(region.address + PAGE, HUGE, Advice.DONTNEED)


def test_collapse_wants_every_page_even_while_registered() -> None:
    with Mapping.anonymous(2 * HUGE) as area, open_uffd() as uffd:
        start = (area.address + HUGE - 1) & ~(HUGE - 1)
        uffd.register(start, HUGE)
        uffd.copy(start, bytes(range(1, 17)) * (HUGE // 16 - PAGE // 16))
        with pytest.raises(UffdError) as caught:
            madvise(start, HUGE, Advice.COLLAPSE)
        need(caught.value.errno != errno.EINVAL, "no transparent huge pages here")
        assert caught.value.errno == errno.EBUSY
        uffd.copy(start + HUGE - PAGE, bytes(PAGE))
        madvise(start, HUGE, Advice.COLLAPSE)
        assert area.load(start - area.address) == 1


def test_process_madvise_on_ourselves_and_on_the_dead(region: Mapping) -> None:
    region.write(0, pattern(region, 0, 4))
    pidfd = pidfd_open(os.getpid())
    try:
        pages = [(region.page(i), PAGE) for i in range(4)]
        assert process_madvise(pidfd, pages * 20, Advice.COLD) == 80 * PAGE  # two system calls
        try:
            emptied = process_madvise(pidfd, pages[:2], Advice.DONTNEED)
        except InvalidRequest:
            pass  # before Linux 6.13 not even to oneself
        else:
            assert emptied == 2 * PAGE
            assert [region.load(i * PAGE) for i in range(4)] == [0, 0, 3, 4]
        unmapped = (region.address + (1 << 40), PAGE)
        with pytest.raises(UffdError):
            process_madvise(pidfd, [unmapped], Advice.COLD)
    finally:
        os.close(pidfd)
    pid = os.posix_spawn("/bin/true", ["true"], {})
    pidfd = pidfd_open(pid)
    os.waitpid(pid, 0)
    try:
        with pytest.raises(ProcessGone):
            process_madvise(pidfd, [(region.address, PAGE)], Advice.COLD)
    finally:
        os.close(pidfd)


def test_memory_files_holes_and_seals() -> None:
    fd = memfd_create("test", 4 * PAGE, flags=MemfdFlag.CLOEXEC | MemfdFlag.ALLOW_SEALING)
    with Mapping.of_file(fd, 4 * PAGE) as region:
        assert file_system(fd).is_shmem
        assert file_system(fd).page_size == PAGE
        allocate(fd, 0, 4 * PAGE)
        assert os.fstat(fd).st_blocks == 4 * PAGE // 512
        region.write(0, pattern(region, 0, 4))
        punch_hole(fd, PAGE, 2 * PAGE)
        assert [region.load(i * PAGE) for i in range(4)] == [1, 0, 0, 4]
        add_seals(fd, Seal.SHRINK)
        assert get_seals(fd) == Seal.SHRINK
        with pytest.raises(PermissionError):
            os.ftruncate(fd, PAGE)


def test_a_hugetlb_file_tells_its_page_size() -> None:
    with memory("hugetlb") as region:
        assert region.fd is not None
        kind = file_system(region.fd)
        assert kind.is_hugetlb
        assert kind.page_size == HUGE == region.page_size
    with pytest.raises(UffdError) as caught:
        memfd_create("odd", hugepage_size=8 << 20)
    assert caught.value.errno == errno.ENODEV


@every_memory
def test_residency_without_faulting(region: Mapping) -> None:
    with open_uffd() as uffd:
        uffd.register(region)
        per_page = region.page_size // PAGE
        assert mincore(region.address, region.length) == bytes(4 * per_page)
        uffd.copy(region.page(1), pattern(region, 1))
        expected = bytes(per_page) + b"\1" * per_page + bytes(2 * per_page)
        assert mincore(region.address, region.length) == expected
        assert is_resident(region.page(1), region.page_size)
        assert not is_resident(region.address, 2 * region.page_size)
        assert uffd.read_events() == []
    with pytest.raises(OutOfMemory):
        mincore(region.address + (1 << 40), PAGE)


def test_pagemap_entries_name_what_is_there(region: Mapping) -> None:
    with open_uffd() as uffd, Pagemap() as pagemap:
        uffd.register(region)
        uffd.copy(region.address, pattern(region))
        need_feature(Feature.POISON)
        uffd.poison(region.page(1), PAGE)
        present, poisoned, absent, _ = pagemap.entries(region.address, 4)
        assert present.is_present
        assert present.is_exclusive
        assert not present.is_file_or_shared
        assert present.frame_number is not None
        assert not poisoned.is_present
        assert poisoned.is_swapped
        assert not poisoned.is_guard
        soft_dirty = 1 << 55  # a fresh mapping is so marked where the kernel has such marks
        assert absent.raw & ~soft_dirty == 0
        assert absent.frame_number is None


def test_pagemap_shows_guards(region: Mapping) -> None:
    try:
        region.advise(Advice.GUARD_INSTALL, 0, PAGE)
    except InvalidRequest:
        need(False, "no guard regions before Linux 6.13")
    with Pagemap() as pagemap:
        assert pagemap.entries(region.address, 1)[0].is_guard
    with pytest.raises(ValueError, match="closed"):
        pagemap.entries(region.address, 1)


def test_mappings_are_found_by_address() -> None:
    with memory("shmem") as region:
        try:
            found = query_mapping(region.address + PAGE)
        except UffdError as error:
            need(error.errno != errno.ENOTTY, "this kernel has no PROCMAP_QUERY (Linux 6.11)")
            raise
        assert found is not None
        assert (found.start, found.end) == (region.address, region.address + region.length)
        assert found.flags & (MappingFlag.SHARED | MappingFlag.WRITABLE) == (
            MappingFlag.SHARED | MappingFlag.WRITABLE
        )
        assert found.page_size == PAGE
        assert "memfd:uffd-mapping" in found.name
        address = region.address
    assert query_mapping(address, flags=MappingFlag.SHARED) is None
    nearby = query_mapping(address, flags=MappingFlag.COVERING_OR_NEXT)
    assert nearby is not None
    assert nearby.end > address


def test_another_users_page_tables_are_closed_to_us() -> None:
    need(os.geteuid() == 0, "needs root", remedy="sudo -E python -m pytest")
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        try:
            Pagemap(os.getppid()).close()
        except PermissionError:
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_mapping_bounds_and_closing(region: Mapping) -> None:
    for offset, length in ((-1, 1), (region.length, 1), (0, region.length + 1)):
        with pytest.raises(ValueError, match="outside"):
            region.read(offset, length)
    with pytest.raises(ValueError, match="no file"):
        region.alias()
    region.write(8, b"\x11\x22")
    assert bytes(region.unsafe_view()[8:10]) == b"\x11\x22"
    region.close()
    region.close()
    with pytest.raises(ValueError, match="outside"):
        region.load(0)
