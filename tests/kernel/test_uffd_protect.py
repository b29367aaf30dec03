"""Write protection: synchronous with messages, asynchronous with PAGEMAP_SCAN; and 7.3's RWP
refused.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.need import need
from tests.support.uffd_kernel import need_marks, need_modes
from tests.support.uffd_memory import (
    MEMORY_TYPES,
    PAGE,
    loading,
    memory,
    need_feature,
    next_fault,
    open_uffd,
    pattern,
    storing,
)
from uffd import (
    Advice,
    Category,
    Feature,
    InvalidRequest,
    Mapping,
    Mode,
    NotPermitted,
    Pagemap,
    RangeNotRegistered,
    ScanFlag,
    kernel_support,
)

pytestmark = pytest.mark.kernel

every_memory = pytest.mark.parametrize("region", MEMORY_TYPES, indirect=True)


@pytest.fixture
def region(request: pytest.FixtureRequest) -> Iterator[Mapping]:
    with memory(getattr(request, "param", "anon")) as mapping:
        yield mapping


@every_memory
def test_a_protected_write_waits_and_is_released(region: Mapping) -> None:
    need_modes(region, Mode.WP)
    region.write(0, pattern(region, 0, 4))
    with open_uffd(Feature.PAGEFAULT_FLAG_WP) as uffd:
        uffd.register(region, Mode.WP)
        uffd.write_protect(region)
        assert region.load(0) == 1  # reads pass
        sleeper = storing(region.address, 9)
        fault = next_fault(uffd)
        assert fault.is_write_protect
        assert fault.is_write
        uffd.write_unprotect(region.address, region.page_size, wake=False)
        assert uffd.queue_depth().total == 1
        uffd.wake(region.address, region.page_size)
        sleeper.join()
        assert region.load(0) == 9
        sleeper = storing(region.page(1), 8)
        next_fault(uffd)
        uffd.unregister(region)  # the kernel would leave this one asleep
        sleeper.join()


@every_memory
def test_a_page_may_arrive_protected(region: Mapping) -> None:
    need_modes(region, Mode.WP)
    need_marks()
    with open_uffd() as uffd, Pagemap() as pagemap:
        uffd.register(region, Mode.MISSING | Mode.WP)
        sleeper = loading(region.address)
        next_fault(uffd)
        uffd.copy(region.address, pattern(region), write_protect=True)
        assert sleeper.join() == 1
        (entry,) = pagemap.entries(region.address, 1)
        assert entry.is_present
        assert entry.is_write_protected
        sleeper = storing(region.address, 3)
        assert next_fault(uffd).is_write_protect
        uffd.write_unprotect(region)
        sleeper.join()


def test_protection_needs_its_registration(region: Mapping) -> None:
    with open_uffd() as uffd:
        uffd.register(region, Mode.MISSING)
        with pytest.raises(RangeNotRegistered):
            uffd.write_protect(region)
        with pytest.raises(InvalidRequest):
            uffd.write_protect(region.address + 1, PAGE)


@pytest.mark.parametrize("unpopulated", [False, True])
def test_anonymous_holes_are_protected_only_on_request(region: Mapping, unpopulated: bool) -> None:
    feature = Feature.WP_UNPOPULATED if unpopulated else Feature.NONE
    with open_uffd(feature) as uffd, Pagemap() as pagemap:
        uffd.register(region, Mode.WP)
        uffd.write_protect(region)
        (entry,) = pagemap.entries(region.address, 1)
        assert entry.is_write_protected == unpopulated
        assert not entry.is_present
        assert entry.is_swapped == unpopulated  # the marker looks like swap
        sleeper = storing(region.address, 1)
        if unpopulated:
            assert next_fault(uffd).is_write_protect
            uffd.write_unprotect(region)
        sleeper.join()


@every_memory
def test_asynchronous_dirty_tracking(region: Mapping) -> None:
    region.write(0, pattern(region, 0, 4))
    with open_uffd(Feature.WP_ASYNC) as uffd, Pagemap() as pagemap:
        uffd.register(region, Mode.WP)
        start, end = region.address, region.address + region.length

        def written() -> list[int]:
            pages: list[int] = []
            for found in pagemap.written_and_protect(start, end):
                first = (found.start - start) // region.page_size
                pages += range(first, first + found.length // region.page_size)
            return pages

        assert written() == [0, 1, 2, 3]  # the first round makes everything clean
        assert written() == []
        region.store(region.page_size, 7)  # no message, no waiting
        region.store(3 * region.page_size + 5, 7)
        assert region.load(0) == 1
        assert uffd.read_events() == []
        assert written() == [1, 3]
        assert written() == []
        if region.fd is None:
            region.advise(Advice.DONTNEED, 0, PAGE)
            assert written() == [0]


def test_a_scan_says_where_it_stopped(region: Mapping) -> None:
    region.write(0, pattern(region, 0, 4))
    with open_uffd(Feature.WP_ASYNC) as uffd, Pagemap() as pagemap:
        uffd.register(region, Mode.WP)
        start, end = region.address, region.address + region.length
        protect = ScanFlag.WP_MATCHING | ScanFlag.CHECK_WPASYNC
        done = pagemap.scan(start, end, mask=Category.WRITTEN, flags=protect, max_regions=0)
        assert done.regions == ()
        assert done.walk_end == end
        for index in (0, 2):
            region.store(index * PAGE, 1)
        found = pagemap.scan(
            start, end, mask=Category.WRITTEN, returned=Category.WRITTEN, max_regions=1
        )
        assert [(r.start, r.length) for r in found.regions] == [(start, PAGE)]
        assert found.walk_end < end
        clean = pagemap.scan(
            start,
            end,
            mask=Category.WRITTEN | Category.WPALLOWED,
            inverted=Category.WRITTEN,
            returned=Category.WRITTEN | Category.PRESENT,
        )
        assert [r.start for r in clean.regions] == [start + PAGE, start + 3 * PAGE]
        assert all(r.categories == Category.PRESENT for r in clean.regions)


def test_a_scan_refuses_what_it_does_not_know(region: Mapping) -> None:
    need_feature(Feature.WP_ASYNC)  # PAGEMAP_SCAN came with it
    with Pagemap() as pagemap, open_uffd() as uffd:
        uffd.register(region, Mode.WP)
        with pytest.raises(InvalidRequest):
            pagemap.scan(region.address, region.address + PAGE, mask=Category(1 << 40))
        with pytest.raises(NotPermitted):  # this context is not asynchronous
            list(pagemap.written_and_protect(region.address, region.address + PAGE))


def test_read_write_protection_is_refused_where_the_kernel_has_none(region: Mapping) -> None:
    need(Feature.RWP not in kernel_support().features, "this kernel has RWP")
    with open_uffd() as uffd:
        with pytest.raises(InvalidRequest):
            uffd.register(region, Mode.RWP)
        uffd.register(region, Mode.WP)
        with pytest.raises(InvalidRequest):
            uffd.read_write_protect(region)
        with pytest.raises(InvalidRequest):
            uffd.read_write_unprotect(region)
        with pytest.raises(InvalidRequest):
            uffd.set_mode(enable=Feature.RWP_ASYNC)


def test_read_write_protection_where_the_kernel_has_it(region: Mapping) -> None:
    need(Feature.RWP in kernel_support().features, "this kernel reports no RWP (Linux 7.3)")
    region.write(0, pattern(region, 0, 4))
    with open_uffd(Feature.RWP) as uffd, Pagemap() as pagemap:
        uffd.register(region, Mode.RWP)
        uffd.read_write_protect(region)
        sleeper = loading(region.address)
        assert next_fault(uffd).is_read_write_protect
        uffd.read_write_unprotect(region.address, PAGE)
        assert sleeper.join() == 1
        uffd.set_mode(enable=Feature.RWP_ASYNC)
        uffd.read_write_protect(region)
        assert region.load(2 * PAGE) == 3  # passes, and is noted
        found = pagemap.scan(
            region.address,
            region.address + region.length,
            mask=Category.ACCESSED,
            returned=Category.ACCESSED,
        )
        assert [(r.start, r.length) for r in found.regions] == [(region.page(2), PAGE)]
