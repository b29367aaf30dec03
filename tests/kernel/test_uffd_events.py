"""Messages of a real kernel: faults, fork, mremap, madvise, munmap; polling, iterating, asyncio."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Iterator

import pytest

from tests.support.uffd_kernel import need_dontneed, need_remap
from tests.support.uffd_memory import (
    HUGE,
    MEMORY_TYPES,
    PAGE,
    TIMEOUT_S,
    in_thread,
    loading,
    memory,
    next_event,
    next_fault,
    open_uffd,
    pattern,
    storing,
)
from uffd import (
    Advice,
    Feature,
    LayoutChanging,
    Mapping,
    Mode,
    PageFault,
    Remap,
    Remove,
    Unmap,
    Userfaultfd,
    kernel_support,
    touch,
)

pytestmark = pytest.mark.kernel

every_memory = pytest.mark.parametrize("region", MEMORY_TYPES, indirect=True)


@pytest.fixture
def region(request: pytest.FixtureRequest) -> Iterator[Mapping]:
    with memory(getattr(request, "param", "anon")) as mapping:
        yield mapping


@every_memory
@pytest.mark.parametrize("exact", [False, True])
def test_address_and_thread_of_a_fault(region: Mapping, exact: bool) -> None:
    offset = region.page_size + 1234 + PAGE * (region.page_size > PAGE)
    with open_uffd(Feature.THREAD_ID | (Feature.EXACT_ADDRESS if exact else Feature.NONE)) as uffd:
        uffd.register(region)
        sleeper = loading(region.address + offset)
        fault = next_fault(uffd)
        expected = region.address + offset if exact else region.page(1)
        assert fault.address == expected
        assert fault.thread_id == sleeper.thread.native_id
        assert not fault.is_write
        uffd.copy(region.page(1), pattern(region))
        sleeper.join()


def test_two_sleepers_send_two_messages(region: Mapping) -> None:
    with open_uffd(Feature.THREAD_ID) as uffd:
        uffd.register(region)
        sleepers = [loading(region.address), loading(region.address)]
        faults: list[PageFault] = []
        while len(faults) < 2:
            assert uffd.wait(TIMEOUT_S)
            faults += [e for e in uffd.read_events() if isinstance(e, PageFault)]
        assert {f.thread_id for f in faults} == {s.thread.native_id for s in sleepers}
        assert uffd.queue_depth().total == 2
        uffd.copy(region.address, pattern(region))
        assert [s.join() for s in sleepers] == [1, 1]


def test_wait_runs_out_and_events_stop(region: Mapping) -> None:
    with open_uffd() as uffd:
        uffd.register(region)
        assert not uffd.wait(0)
        assert uffd.read_events() == []
        assert list(uffd.events(timeout_s=0)) == []
        stop = os.eventfd(1)
        try:
            assert list(uffd.events(stop=stop)) == []
        finally:
            os.close(stop)


def test_iterating_serves_in_a_few_lines(region: Mapping) -> None:
    with open_uffd() as uffd:
        uffd.register(region, Mode.MISSING)
        reader = in_thread(lambda: region.read(0, region.length))
        for served, event in enumerate(uffd, start=1):
            assert isinstance(event, PageFault)
            index = (event.address - region.address) // PAGE
            uffd.copy(event.address, pattern(region, index))
            if served == region.page_count:
                break
        assert reader.join() == pattern(region, 0, region.page_count)


def test_asyncio_iteration(region: Mapping) -> None:
    async def serve(uffd: Userfaultfd) -> list[int]:
        seen: list[int] = []
        async for event in uffd:
            assert isinstance(event, PageFault)
            uffd.zeropage(event.address, PAGE)
            seen.append(event.address)
            if len(seen) == region.page_count:
                break
        return seen

    with open_uffd() as uffd:
        uffd.register(region)
        reader = in_thread(lambda: region.read(0, region.length))
        seen = asyncio.run(asyncio.wait_for(serve(uffd), TIMEOUT_S))
        assert seen == [region.page(i) for i in range(region.page_count)]
        assert reader.join() == bytes(region.length)


# -- the layout changes -------------------------------------------------------------------------


@every_memory
def test_remove_waits_to_be_read_and_refuses_placing_meanwhile(region: Mapping) -> None:
    need_dontneed(region)
    with open_uffd(Feature.EVENT_REMOVE) as uffd:
        uffd.register(region)
        uffd.copy(region.address, pattern(region))
        page = region.page_size
        remover = in_thread(lambda: region.advise(Advice.DONTNEED, 0, page))
        assert uffd.wait(TIMEOUT_S)
        assert not remover.finished
        with pytest.raises(LayoutChanging):
            uffd.copy(region.page(3), bytes(page))
        if Feature.POISON in kernel_support().features:
            with pytest.raises(LayoutChanging):
                uffd.poison(region.page(3), page)
        assert uffd.read_events() == [Remove(region.address, region.page(1))]
        remover.join()
        assert uffd.copy(region.page(3), bytes(page)) == page


@pytest.mark.parametrize("region", ["shmem", "hugetlb"], indirect=True)
def test_madvise_remove_reports_and_a_hole_does_not(region: Mapping) -> None:
    from uffd import punch_hole

    assert region.fd is not None
    with open_uffd(Feature.EVENT_REMOVE) as uffd:
        uffd.register(region)
        uffd.copy(region.address, pattern(region, 0, 2))
        punch_hole(region.fd, 0, region.page_size)
        assert uffd.read_events() == []
        remover = in_thread(
            lambda: region.advise(Advice.REMOVE, region.page_size, region.page_size)
        )
        assert next_event(uffd) == Remove(region.page(1), region.page(2))
        remover.join()
        for index in (0, 1):  # both are missing again
            assert uffd.copy(region.page(index), pattern(region)) == region.page_size


@every_memory
def test_mremap_reports_the_move_and_then_the_old_range(region: Mapping) -> None:
    need_remap(region)
    with open_uffd(Feature.EVENT_REMAP | Feature.EVENT_UNMAP) as uffd:
        uffd.register(region)
        uffd.copy(region.address, pattern(region))
        old, length = region.address, region.length
        mover = in_thread(region.remap)
        move = next_event(uffd)
        assert isinstance(move, Remap)
        assert (move.source, move.length) == (old, length)
        assert next_event(uffd) == Unmap(old, old + length)
        moved = mover.join()
        assert isinstance(moved, Mapping)
        with moved:
            assert moved.address == move.destination
            assert moved.load(0) == 1
            sleeper = loading(moved.page(1))  # still registered at the new place
            assert next_fault(uffd).address == moved.page(1)
            uffd.copy(moved.page(1), pattern(moved, 1))
            assert sleeper.join() == 2
            closer = in_thread(moved.close)
            assert next_event(uffd) == Unmap(move.destination, move.destination + length)
            closer.join()


def test_without_the_feature_mremap_drops_the_registration(region: Mapping) -> None:
    from uffd import RangeNotRegistered

    with open_uffd() as uffd:
        uffd.register(region)
        with region.remap() as moved, pytest.raises(RangeNotRegistered):
            uffd.copy(moved.address, bytes(PAGE))


def test_mremap_can_leave_an_empty_registered_range_behind(region: Mapping) -> None:
    region.write(0, pattern(region, 0, 4))
    with open_uffd() as uffd:
        uffd.register(region)
        with region.remap(keep_old=True) as moved:
            assert moved.read(0, moved.length) == pattern(moved, 0, 4)
            sleeper = loading(region.address)
            next_fault(uffd)
            uffd.copy(region.address, moved.read(0, PAGE))
            assert sleeper.join() == 1


def test_a_new_place_is_aligned_to_the_host_page_also_where_the_kernel_does_not_care() -> None:
    """Up to Linux 6.6 an anonymous mapping lies where there is room, and a huge page moved onto it
    is refused. Newer kernels align to 2 MiB by themselves; so a page that is larger still.
    """
    size = 1 << 30
    old = Mapping.anonymous(size)
    claimed = Mapping(old.address, size, page_size=size, fd=None, is_shared=False)
    with contextlib.ExitStack() as kept:
        for _ in range(4):
            kept.enter_context(Mapping.anonymous(HUGE))  # what the next place lies beside
            claimed = claimed.remap()
            assert claimed.address % size == 0
        claimed.close()


@pytest.mark.parametrize("region", MEMORY_TYPES, indirect=True)
def test_fork_brings_the_child_its_own_context(region: Mapping) -> None:
    """A forking Python keeps the interpreter lock until the event is read: read it natively."""
    from uffd import FaultHandler, Fork

    forks: list[Fork] = []
    arrived = threading.Event()

    def on_event(event: object) -> None:
        assert isinstance(event, Fork)
        forks.append(event)
        arrived.set()

    with open_uffd(Feature.EVENT_FORK | Feature.THREAD_ID) as uffd:
        uffd.register(region)
        uffd.copy(region.address, pattern(region))
        with FaultHandler(uffd, [], on_event=on_event):
            pid = os.fork()
            if pid == 0:
                same = touch.load(region.address) == 1
                os._exit(touch.load(region.page(2)) if same else 99)
            assert arrived.wait(TIMEOUT_S)
        child = forks[0].child
        with child:
            assert child.features == uffd.features
            assert child.is_nonblocking
            assert not child.is_own_memory
            assert not os.get_inheritable(child.fileno())
            fault = next_fault(child)
            assert fault.address == region.page(2)
            assert fault.thread_id == pid
            child.copy(region.page(2), bytes([42]) * region.page_size)
            _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 42
        if not region.is_shared:  # the parent's page is its own, and still missing
            sleeper = storing(region.page(2), 1)
            assert next_fault(uffd).address == region.page(2)
            uffd.copy(region.page(2), pattern(region))
            sleeper.join()
