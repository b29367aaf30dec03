"""REGISTER and the placing operations on every memory type, errors provoked on the real kernel."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.need import need
from tests.support.uffd_kernel import need_modes
from tests.support.uffd_memory import (
    HUGE,
    MEMORY_TYPES,
    PAGE,
    SHARED_TYPES,
    grow_pool,
    loading,
    memory,
    need_feature,
    next_fault,
    open_uffd,
    pattern,
    pool_count,
    pool_lock,
    storing,
)
from uffd import (
    Advice,
    BadAddress,
    Feature,
    HugepagePoolEmpty,
    InvalidRequest,
    Ioctls,
    Mapping,
    Mode,
    NotPermitted,
    OutOfMemory,
    PageAlreadyPresent,
    PageShared,
    RangeNotRegistered,
    RangeOwnedElsewhere,
    Seal,
    UffdError,
    Userfaultfd,
    is_resident,
    memfd_create,
)
from uffd.files import MemfdFlag, add_seals

pytestmark = pytest.mark.kernel

every_memory = pytest.mark.parametrize("region", MEMORY_TYPES, indirect=True)
shared_memory = pytest.mark.parametrize("region", SHARED_TYPES, indirect=True)


@pytest.fixture
def region(request: pytest.FixtureRequest) -> Iterator[Mapping]:
    with memory(getattr(request, "param", "anon")) as mapping:
        yield mapping


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    with open_uffd() as context:
        yield context


# -- REGISTER -----------------------------------------------------------------------------------


@every_memory
@pytest.mark.parametrize("bits", range(8))
def test_register_answers_the_operations_of_mode_and_memory(
    uffd: Userfaultfd, region: Mapping, bits: int
) -> None:
    mode, is_huge = Mode(bits), region.page_size == HUGE
    is_anonymous = region.fd is None
    if not bits or (Mode.MINOR in mode and is_anonymous):
        with pytest.raises(InvalidRequest):
            uffd.register(region, mode)
        return
    need_modes(region, mode)
    answer = uffd.register(region, mode)
    assert (answer.address, answer.length, answer.mode) == (region.address, region.length, mode)
    assert Ioctls.COPY | Ioctls.WAKE in answer.ioctls
    assert (Ioctls.ZEROPAGE in answer.ioctls) == (not is_huge)
    assert answer.is_hugetlb == is_huge
    assert (Ioctls.WRITEPROTECT in answer.ioctls) == (Mode.WP in mode)
    assert (Ioctls.CONTINUE in answer.ioctls) == (Mode.MINOR in mode)


def test_register_takes_an_address_and_a_length_too(uffd: Userfaultfd, region: Mapping) -> None:
    assert uffd.register(region.address, PAGE, Mode.MISSING).length == PAGE
    with pytest.raises(RangeNotRegistered):
        uffd.copy(region.address, bytes(2 * PAGE))  # crosses the registration's end


@pytest.mark.parametrize("offset_length", [(1, PAGE), (0, 1), (0, 0)])
def test_register_refuses_what_is_not_pages(
    uffd: Userfaultfd, region: Mapping, offset_length: tuple[int, int]
) -> None:
    offset, length = offset_length
    with pytest.raises(InvalidRequest) as caught:
        uffd.register(region.address + offset, length)
    assert caught.value.operation == "UFFDIO_REGISTER"
    assert caught.value.address == region.address + offset


def test_register_refuses_unmapped_and_disk_memory(uffd: Userfaultfd, tmp_path: Path) -> None:
    with memory("anon") as gone:
        address = gone.address
    with pytest.raises(InvalidRequest):
        uffd.register(address, PAGE)
    path = Path("/var/tmp") / f"uffd-{os.getpid()}"
    path.write_bytes(bytes(PAGE))
    try:
        fd = os.open(path, os.O_RDWR)
    finally:
        path.unlink()
    with Mapping.of_file(fd, PAGE) as disk:
        need(os.statvfs(fd).f_blocks > 0, "no disk file system")
        with pytest.raises(InvalidRequest):
            uffd.register(disk)


def test_register_refuses_a_file_that_cannot_be_written(uffd: Userfaultfd) -> None:
    fd = memfd_create("sealed", PAGE, flags=MemfdFlag.CLOEXEC | MemfdFlag.ALLOW_SEALING)
    add_seals(fd, Seal.WRITE)
    sealed = Mapping.of_file(fd, PAGE, protection=mmap.PROT_READ)
    with sealed, pytest.raises(NotPermitted):
        uffd.register(sealed)


def test_a_range_has_one_owner(uffd: Userfaultfd, region: Mapping) -> None:
    uffd.register(region)
    with open_uffd() as other, pytest.raises(RangeOwnedElsewhere):
        other.register(region)


@shared_memory
def test_unregister_wakes_minor_waiters_too(uffd: Userfaultfd, region: Mapping) -> None:
    need_modes(region, Mode.MINOR)
    with region.alias() as writer:
        writer.write(0, b"\x2a")
        uffd.register(region, Mode.MISSING | Mode.MINOR)
        sleeper = loading(region.address)
        assert next_fault(uffd).is_minor
        uffd.unregister(region)
        assert sleeper.join() == 0x2A


# -- COPY ---------------------------------------------------------------------------------------


@every_memory
def test_a_sleeping_store_resumes_on_the_placed_bytes(uffd: Userfaultfd, region: Mapping) -> None:
    uffd.register(region)
    sleeper = storing(region.address + 1, 0x5A)
    fault = next_fault(uffd)
    assert fault.is_write
    assert fault.is_missing
    assert fault.address == region.address
    assert not sleeper.finished
    assert uffd.copy(region.address, pattern(region)) == region.page_size
    sleeper.join()
    assert region.read(0, 3) == b"\x01\x5a\x02"


@every_memory
def test_copy_stops_short_at_a_present_page(uffd: Userfaultfd, region: Mapping) -> None:
    uffd.register(region)
    page = region.page_size
    uffd.copy(region.page(2), pattern(region, 2))
    assert uffd.copy(region.address, pattern(region, 0, 4)) == 2 * page
    with pytest.raises(PageAlreadyPresent) as caught:
        uffd.copy(region.page(2), pattern(region, 2, 2))
    assert (caught.value.address, caught.value.length) == (region.page(2), 2 * page)
    assert uffd.copy(region.page(3), pattern(region, 3)) == page
    assert region.read(0, region.length) == pattern(region, 0, 4)


def test_exists_wakes_unless_told_not_to(uffd: Userfaultfd, region: Mapping) -> None:
    uffd.register(region)
    sleeper = loading(region.address)
    next_fault(uffd)
    uffd.copy(region.address, pattern(region), wake=False)
    with pytest.raises(PageAlreadyPresent):
        uffd.copy(region.address, pattern(region), wake=False)
    assert uffd.queue_depth().total == 1  # still asleep
    with pytest.raises(PageAlreadyPresent):
        uffd.copy(region.address, pattern(region))
    assert sleeper.join() == 1


def test_copy_errors(uffd: Userfaultfd, region: Mapping) -> None:
    with pytest.raises(RangeNotRegistered):
        uffd.copy(region.address, bytes(PAGE))
    uffd.register(region)
    with pytest.raises(InvalidRequest):
        uffd.copy(region.address + 1, bytes(PAGE))
    with pytest.raises(InvalidRequest):
        uffd.copy(region.address, bytes(PAGE - 1))
    with pytest.raises(InvalidRequest):
        uffd.copy(region.address, bytes(PAGE), write_protect=True)  # not registered with WP
    with pytest.raises(BadAddress):
        uffd.copy(region.address, 0x1000, PAGE)
    with pytest.raises(ValueError, match="exceeds"):
        uffd.copy(region.address, bytes(PAGE), 2 * PAGE)
    with pytest.raises(TypeError):
        uffd.copy(region.address, region.address)
    # Neither of them left anything behind.
    assert uffd.copy(region.address, bytes(PAGE)) == PAGE


@pytest.mark.parametrize("region", ["shmem"], indirect=True)
def test_copy_beyond_the_end_of_a_file(uffd: Userfaultfd, region: Mapping) -> None:
    assert region.fd is not None
    uffd.register(region)
    os.ftruncate(region.fd, PAGE)
    # ENOMEM from Linux 7.3 on, EFAULT before.
    with pytest.raises((BadAddress, OutOfMemory)):
        uffd.copy(region.page(1), bytes(PAGE))


def copy_until_refused(uffd: Userfaultfd, region: Mapping, placements: list[int]) -> None:
    for index in range(region.page_count):
        placements.append(uffd.copy(region.page(index), bytes(region.page_size)))


@pytest.mark.parametrize("shared", [True, False])
def test_an_empty_pool_is_not_taken_for_a_present_page(uffd: Userfaultfd, shared: bool) -> None:
    need(os.geteuid() == 0, "needs root", remedy="sudo -E python -m pytest")
    with pool_lock():
        spare = pool_count("free") - pool_count("resv")
        need(spare <= 64, f"{spare} free huge pages would have to be used up")
        pages = spare + 2
        with Mapping.memfd(
            pages * HUGE, hugepage_size=HUGE, shared=shared, reserve=False
        ) as region:
            uffd.register(region)
            placements: list[int] = []
            with pytest.raises(HugepagePoolEmpty) as caught:
                copy_until_refused(uffd, region, placements)
            placed = len(placements)
            # ENOMEM up to Linux 6.12.
            assert caught.value.errno in (errno.EEXIST, errno.ENOMEM)
            assert not is_resident(region.page(placed), HUGE)
            grown = grow_pool(1)
            try:
                need(grown == 1, "no memory for one huge page")
                assert uffd.copy(region.page(placed), bytes(HUGE)) == HUGE
                with pytest.raises(PageAlreadyPresent):  # and now it is what it says
                    uffd.copy(region.page(placed), bytes(HUGE))
            finally:
                grow_pool(-grown)


def test_a_source_that_is_not_mapped_in_does_not_need_a_second_huge_page(
    uffd: Userfaultfd,
) -> None:
    """The kernel alone would say ENOMEM: it copies through a second page from such a source."""
    need(os.geteuid() == 0, "needs root", remedy="sudo -E python -m pytest")
    with pool_lock():
        spare = pool_count("free") - pool_count("resv")
        need(spare <= 64, f"{spare} free huge pages would have to be used up")
        grown = grow_pool(1)
        try:
            need(grown == 1, "no memory for one huge page")
            pages = spare + 1
            region = Mapping.memfd(pages * HUGE, hugepage_size=HUGE, reserve=False)
            with region, Mapping.anonymous(HUGE) as source:
                uffd.register(region)
                for index in range(pages):
                    source.advise(Advice.DONTNEED)
                    assert uffd.copy(region.page(index), source.address, HUGE) == HUGE
        finally:
            grow_pool(-grown)


# -- ZEROPAGE, CONTINUE, POISON, MOVE -----------------------------------------------------------


@every_memory
def test_zeropage_where_there_is_one(uffd: Userfaultfd, region: Mapping) -> None:
    uffd.register(region)
    if region.page_size == HUGE:
        with pytest.raises(InvalidRequest):
            uffd.zeropage(region.address, HUGE)
        return
    sleeper = loading(region.address)
    next_fault(uffd)
    assert uffd.zeropage(region) == region.length
    assert sleeper.join() == 0
    with pytest.raises(PageAlreadyPresent):
        uffd.zeropage(region.address, PAGE)


@shared_memory
def test_continue_maps_what_the_file_has(uffd: Userfaultfd, region: Mapping) -> None:
    need_modes(region, Mode.MINOR)
    uffd.register(region, Mode.MISSING | Mode.MINOR)
    with region.alias() as writer:
        writer.write(0, pattern(region, 0, 2))
        sleeper = storing(region.address, 9)
        fault = next_fault(uffd)
        assert fault.is_minor
        assert fault.is_write
        assert uffd.continue_(region.address, region.page_size) == region.page_size
        sleeper.join()
        assert writer.load(0) == 9
        with pytest.raises(PageAlreadyPresent):
            uffd.continue_(region.address, region.page_size)
        assert uffd.continue_(region.page(1), 2 * region.page_size) == region.page_size
        with pytest.raises(BadAddress):  # the file has no such page
            uffd.continue_(region.page(2), region.page_size)
        with pytest.raises(PageAlreadyPresent):  # the page cache counts for COPY
            uffd.copy(region.page(0), bytes(region.page_size))
        assert region.read(region.page_size, region.page_size) == pattern(region, 1)


@every_memory
def test_poison_and_its_cure(uffd: Userfaultfd, region: Mapping) -> None:
    need_feature(Feature.POISON)
    uffd.register(region)
    assert uffd.poison(region.address, 2 * region.page_size) == 2 * region.page_size
    with pytest.raises(PageAlreadyPresent):
        uffd.poison(region.address, region.page_size)
    assert uffd.copy(region.address, pattern(region)) == region.page_size
    assert region.load(0) == 1


def test_move_takes_the_pages_away(uffd: Userfaultfd, region: Mapping) -> None:
    need_feature(Feature.MOVE)
    uffd.register(region)
    with Mapping.anonymous(region.length) as source:
        source.write(0, pattern(source, 0, 2))
        sleeper = loading(region.address)
        next_fault(uffd)
        assert uffd.move(region.address, source.address, 2 * PAGE) == 2 * PAGE
        assert sleeper.join() == 1
        assert region.read(0, 2 * PAGE) == pattern(region, 0, 2)
        assert not is_resident(source.address, PAGE)
        with pytest.raises(RangeNotRegistered):  # a hole
            uffd.move(region.page(2), source.page(2), PAGE)
        assert uffd.move(region.page(2), source.page(2), PAGE, allow_holes=True) == PAGE
        source.store(3 * PAGE, 7)
        uffd.copy(region.page(3), bytes(PAGE))
        with pytest.raises(PageAlreadyPresent):
            uffd.move(region.page(3), source.page(3), PAGE)


def test_move_refuses_a_page_shared_with_a_child(uffd: Userfaultfd, region: Mapping) -> None:
    need_feature(Feature.MOVE)
    uffd.register(region)
    with Mapping.anonymous(PAGE) as source:
        source.store(0, 1)
        read_end, write_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(write_end)
            os.read(read_end, 1)
            os._exit(0)
        os.close(read_end)
        try:
            with pytest.raises(PageShared):
                uffd.move(region.address, source.address, PAGE)
        finally:
            os.close(write_end)
            os.waitpid(pid, 0)
        source.store(0, 2)  # written again, so exclusive again
        assert uffd.move(region.address, source.address, PAGE) == PAGE


@pytest.mark.parametrize("region", ["shmem", "hugetlb"], indirect=True)
def test_move_is_for_private_anonymous_memory(uffd: Userfaultfd, region: Mapping) -> None:
    need_feature(Feature.MOVE)
    uffd.register(region)
    with Mapping.anonymous(region.page_size) as source:
        source.store(0, 1)
        with pytest.raises(UffdError) as caught:
            uffd.move(region.address, source.address, region.page_size)
        assert caught.value.errno == errno.EINVAL


def test_wake_checks_only_alignment(uffd: Userfaultfd, region: Mapping) -> None:
    uffd.wake(region)
    for offset, length in ((1, PAGE), (0, 0)):
        with pytest.raises(InvalidRequest):
            uffd.wake(region.address + offset, length)


def test_a_wake_without_a_page_reports_the_fault_again(uffd: Userfaultfd, region: Mapping) -> None:
    uffd.register(region)
    sleeper = loading(region.address)
    first = next_fault(uffd)
    uffd.wake(region)
    assert next_fault(uffd) == first
    uffd.zeropage(region)
    assert sleeper.join() == 0
