"""The native fault loop: every page source, every trap, and the interpreter lock it does not
need.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.support.need import need
from tests.support.uffd_kernel import need_dontneed, need_modes, need_remap
from tests.support.uffd_memory import (
    HUGE,
    MEMORY_TYPES,
    PAGE,
    SHARED_TYPES,
    TIMEOUT_S,
    grow_pool,
    in_thread,
    loading,
    memory,
    next_fault,
    open_uffd,
    pattern,
    pool_count,
    pool_lock,
    storing,
)
from uffd import (
    Advice,
    BufferSource,
    CallableSource,
    FaultHandler,
    FaultStatistics,
    Feature,
    FileSource,
    Fork,
    HugepagePoolEmpty,
    Mapping,
    Mode,
    PageCacheSource,
    PageFault,
    PageSource,
    Remap,
    Remove,
    Served,
    UffdError,
    Userfaultfd,
    ZeroSource,
    is_resident,
    memfd_create,
    touch,
)

pytestmark = pytest.mark.kernel

every_memory = pytest.mark.parametrize("region", MEMORY_TYPES, indirect=True)
shared_memory = pytest.mark.parametrize("region", SHARED_TYPES, indirect=True)

EVENTS = Feature.THREAD_ID | Feature.EVENT_REMOVE
MOVES = EVENTS | Feature.EVENT_REMAP | Feature.EVENT_UNMAP


@pytest.fixture
def region(request: pytest.FixtureRequest) -> Iterator[Mapping]:
    with memory(getattr(request, "param", "anon")) as mapping:
        yield mapping


@pytest.fixture
def uffd() -> Iterator[Userfaultfd]:
    with open_uffd(EVENTS) as context:
        yield context


class Mailbox:
    """Events as they come, and a wait for the first that fits."""

    def __init__(self) -> None:
        self.events: list[object] = []
        self._news = threading.Condition()

    def __call__(self, event: object) -> None:
        with self._news:
            self.events.append(event)
            self._news.notify_all()

    def wait_for(self, kind: type) -> object:
        def found() -> list[object]:
            return [e for e in self.events if isinstance(e, kind)]

        with self._news:
            assert self._news.wait_for(found, TIMEOUT_S), f"no {kind} in {self.events}"
            return found()[0]


def final_counts(handler: FaultHandler) -> FaultStatistics:
    """A page wakes its sleeper before the loop has counted it, so stop first."""
    handler.stop()
    return handler.statistics()


# -- sources ------------------------------------------------------------------------------------


def file_with(data: bytes) -> int:
    fd = memfd_create("source")
    os.write(fd, data)
    return fd


def buffer_source(data: bytes) -> PageSource:
    return BufferSource(data)


def file_source(data: bytes) -> PageSource:
    return FileSource(file_with(bytes(PAGE) + data), PAGE)


def callable_source(data: bytes) -> PageSource:
    return CallableSource(lambda offset, length: data[offset : offset + length])


@every_memory
@pytest.mark.parametrize("make", [buffer_source, file_source, callable_source])
@pytest.mark.parametrize("unit_pages", [1, 3])
def test_every_source_brings_the_right_bytes(
    uffd: Userfaultfd, region: Mapping, make: Callable[[bytes], PageSource], unit_pages: int
) -> None:
    data = pattern(region, 0, region.page_count)
    source = make(data)
    uffd.register(region)
    served = Served(region, source, unit=unit_pages * region.page_size)
    with FaultHandler(uffd, [served]) as handler:
        assert in_thread(lambda: region.read(0, region.length)).join() == data
        counts = final_counts(handler)
        assert counts.missing == -(-region.page_count // unit_pages)
        assert counts.placed_bytes == region.length
        assert sum(counts.latency_ns) == counts.missing + counts.duplicates
        assert len(handler.pending) == 0  # the loop has stopped: nothing is under way
    if isinstance(source, FileSource):
        os.close(source.fd)


@every_memory
def test_zeros_and_the_end_of_a_short_source(uffd: Userfaultfd, region: Mapping) -> None:
    data = pattern(region, 0, 2)[: region.page_size + 100]
    uffd.register(region)
    with FaultHandler(uffd, [Served(region, BufferSource(data))]) as handler:
        assert region.read(0, region.length) == data.ljust(region.length, b"\0")
        assert final_counts(handler).zero_bytes == 2 * region.page_size


@every_memory
def test_zero_source(uffd: Userfaultfd, region: Mapping) -> None:
    uffd.register(region)
    with FaultHandler(uffd, [Served(region, ZeroSource())]):
        region.store(5, 1)
        assert region.read(0, region.length) == b"\0\0\0\0\0\1".ljust(region.length, b"\0")


@shared_memory
def test_page_cache_source_maps_what_an_alias_wrote(uffd: Userfaultfd, region: Mapping) -> None:
    need_modes(region, Mode.MINOR)
    uffd.register(region, Mode.MISSING | Mode.MINOR)
    with (
        region.alias() as writer,
        FaultHandler(uffd, [Served(region, PageCacheSource())]) as handler,
    ):
        writer.write(0, pattern(region, 0, 2))
        assert region.read(0, region.length) == pattern(region, 0, 2) + bytes(2 * region.page_size)
        counts = final_counts(handler)
        assert (counts.minor, counts.missing) == (2, 2)


def test_several_ranges_several_sources(uffd: Userfaultfd) -> None:
    with memory("anon") as one, memory("shmem") as two:
        uffd.register(one)
        uffd.register(two)
        served = [
            Served(one, CallableSource(lambda offset, length: bytes([offset // PAGE]) * length)),
            Served(two, BufferSource(pattern(two, 0, 4))),
        ]
        with FaultHandler(uffd, served) as handler:
            assert handler.needs_python
            assert [one.load(i * PAGE) for i in (3, 1)] == [3, 1]
            assert [two.load(i * PAGE) for i in (3, 1)] == [4, 2]


def test_no_thread_is_forgotten_and_none_is_served_twice(uffd: Userfaultfd) -> None:
    """Many threads on few pages: one placement each, the rest are duplicates or already present."""
    with memory("anon", 16) as region:
        uffd.register(region)
        with FaultHandler(uffd, [Served(region, BufferSource(pattern(region, 0, 16)))]) as handler:
            readers = [in_thread(lambda: region.read(0, region.length)) for _ in range(8)]
            assert {r.join() for r in readers} == {pattern(region, 0, 16)}
            counts = final_counts(handler)
        assert counts.placed_bytes == region.length
        assert counts.missing - counts.already_present <= 16


def test_pages_placed_by_others_are_woken(uffd: Userfaultfd, region: Mapping) -> None:
    """Somebody prefetches without waking; the sleeper's own fault finds the page there."""
    uffd.register(region)
    sleeper = loading(region.address)
    assert uffd.wait(TIMEOUT_S)
    uffd.copy(region.address, pattern(region), wake=False)
    with FaultHandler(uffd, [Served(region, ZeroSource())]):
        assert sleeper.join() == 1


# -- the interpreter lock -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["anon", "shmem"])
def test_native_sources_serve_a_thread_that_holds_the_interpreter_lock(kind: str) -> None:
    body = f"""
        from uffd import *
        region = Mapping.anonymous(1 << 16) if {kind!r} == "anon" else Mapping.memfd(1 << 16)
        with region, Userfaultfd.open(Feature.THREAD_ID | Feature.EVENT_REMOVE) as uffd:
            uffd.register(region)
            with FaultHandler(uffd, [Served(region, BufferSource(b"z" * region.length))]) as h:
                assert bytes(region.unsafe_view()) == b"z" * region.length
                h.stop()
                assert h.statistics().missing == 16
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(body)], timeout=60, check=False)
    assert done.returncode == 0


def test_a_callable_source_raising_ends_the_handler_not_the_sleep(
    uffd: Userfaultfd, region: Mapping
) -> None:
    uffd.register(region)
    answers: list[bytes | Exception] = [
        ZeroDivisionError("no page today"),
        b"short",
        bytes([7]) * PAGE,
    ]

    def fetch(offset: int, length: int) -> bytes:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with_callable = FaultHandler(uffd, [Served(region, CallableSource(fetch))])
    sleeper = loading(region.page(1))
    with_callable.start()
    with pytest.raises(ZeroDivisionError, match="no page today"):
        with_callable.join(TIMEOUT_S)
    assert not sleeper.finished
    with_callable.start()  # again: the sleeper's message is not lost
    with pytest.raises(ValueError, match="gave 5 bytes"):
        with_callable.join(TIMEOUT_S)
    with_callable.start()
    assert sleeper.join() == 7
    with_callable.close()
    with_callable.close()


# -- layout changes -----------------------------------------------------------------------------


@every_memory
def test_pages_given_back_return_as_zeros(uffd: Userfaultfd, region: Mapping) -> None:
    if not region.is_shared:
        need_dontneed(region)
    uffd.register(region)
    data = pattern(region, 0, 4)
    seen = Mailbox()
    served = Served(region, BufferSource(data), unit=4 * region.page_size)
    with FaultHandler(uffd, [served], on_event=seen) as handler:
        assert region.load(0) == 1
        advice = Advice.REMOVE if region.is_shared else Advice.DONTNEED
        region.advise(advice, region.page_size, 2 * region.page_size)
        assert seen.wait_for(Remove) == Remove(region.page(1), region.page(3))
        page = region.page_size
        assert region.read(0, region.length) == data[:page] + bytes(2 * page) + data[3 * page :]
        assert final_counts(handler).removes == 1


def test_faults_are_served_while_pages_are_given_back_all_the_time(uffd: Userfaultfd) -> None:
    """Every placement may meet EAGAIN; nothing hangs and every byte is old data or zero."""
    with memory("anon", 64) as region:
        uffd.register(region)
        data = pattern(region, 0, 64)
        done = threading.Event()

        def give_back() -> None:
            for turn in range(400):
                region.advise(Advice.DONTNEED, turn * 7 % 64 * PAGE, PAGE)
            done.set()

        with FaultHandler(uffd, [Served(region, BufferSource(data))]) as handler:
            remover = in_thread(give_back)
            while not done.is_set():
                for index in range(64):
                    assert region.load(index * PAGE) in (0, index + 1)
            remover.join()
            # Every page was given back at least once after its last old byte could be placed.
            assert {region.load(i * PAGE) for i in range(64)} == {0}
            assert final_counts(handler).removes == 400


@pytest.fixture
def moving_uffd(region: Mapping) -> Iterator[Userfaultfd]:
    """Closed before ``region`` is unmapped: an unmap waits until its message is read."""
    with open_uffd(MOVES) as context:
        yield context


@every_memory
def test_the_range_follows_an_mremap(moving_uffd: Userfaultfd, region: Mapping) -> None:
    need_remap(region)
    uffd = moving_uffd
    uffd.register(region)
    data = pattern(region, 0, 4)
    seen = Mailbox()
    source = CallableSource(lambda offset, length: data[offset : offset + length])
    with FaultHandler(uffd, [Served(region, source)], on_event=seen) as handler:
        assert region.load(0) == 1
        with region.remap() as moved:
            event = seen.wait_for(Remap)
            assert isinstance(event, Remap)
            assert event.destination == moved.address
            assert moved.read(0, moved.length) == data
        assert final_counts(handler).remaps == 1
        assert final_counts(handler).unmaps == 2


def test_part_of_a_range_is_unmapped_or_moved() -> None:
    with memory("anon", 8) as region, open_uffd(MOVES) as uffd:
        uffd.register(region)
        data = pattern(region, 0, 8)
        with FaultHandler(uffd, [Served(region, BufferSource(data))]):
            middle = Mapping(region.page(2), 2 * PAGE, page_size=PAGE, fd=None, is_shared=False)
            with middle.remap() as moved:
                assert moved.read(0, 2 * PAGE) == data[2 * PAGE : 4 * PAGE]
            tail = Mapping(region.page(6), 2 * PAGE, page_size=PAGE, fd=None, is_shared=False)
            tail.close()
            assert region.read(0, 2 * PAGE) == data[: 2 * PAGE]
            assert region.read(4 * PAGE, 2 * PAGE) == data[4 * PAGE : 6 * PAGE]


# -- what the loop passes on --------------------------------------------------------------------


def test_a_fork_child_is_handed_over_and_can_be_served(region: Mapping) -> None:
    seen = Mailbox()
    with open_uffd(Feature.EVENT_FORK | Feature.THREAD_ID) as uffd:
        uffd.register(region)
        served = [Served(region, BufferSource(pattern(region, 0, 4)))]
        with FaultHandler(uffd, served, on_event=seen) as handler:
            pid = os.fork()
            if pid == 0:
                os._exit(touch.load(region.page(2)))
            fork = seen.wait_for(Fork)
            assert isinstance(fork, Fork)
            with fork.child, FaultHandler(fork.child, served):
                _, status = os.waitpid(pid, 0)
            assert os.waitstatus_to_exitcode(status) == 3
            assert region.load(2 * PAGE) == 3  # the parent's own fault, its own context
            assert final_counts(handler).forks == 1


def test_faults_elsewhere_and_write_faults_are_passed_on(uffd: Userfaultfd) -> None:
    with memory("anon") as served, memory("anon") as other:
        uffd.register(served, Mode.MISSING | Mode.WP)
        uffd.register(other)

        def resolve(event: object) -> None:
            assert isinstance(event, PageFault)
            if event.is_write_protect:
                uffd.write_unprotect(event.address, PAGE)
            else:
                uffd.copy(event.address, b"o" * PAGE)

        source = Served(served, BufferSource(pattern(served, 0, 4)))
        with FaultHandler(uffd, [source], on_event=resolve) as handler:
            assert served.load(0) == 1
            uffd.write_protect(served.address, PAGE)
            storing(served.address, 9).join()
            assert served.load(0) == 9
            assert loading(other.address).join() == ord("o")
            assert final_counts(handler).passed_on == 2


def test_an_event_callback_that_raises_ends_the_handler(uffd: Userfaultfd, region: Mapping) -> None:
    def refuse(event: object) -> None:
        raise ArithmeticError(f"unwanted {event}")

    uffd.register(region)
    handler = FaultHandler(uffd, [], on_event=refuse)
    handler.start()
    sleeper = loading(region.address)
    with pytest.raises(ArithmeticError, match="unwanted"):
        handler.join(TIMEOUT_S)
    handler.close()
    uffd.zeropage(region)
    sleeper.join()


# -- pages that cannot be had -------------------------------------------------------------------


def test_an_empty_pool_ends_the_handler_and_a_filled_one_goes_on(uffd: Userfaultfd) -> None:
    need(os.geteuid() == 0, "needs root", remedy="sudo -E python -m pytest")
    with pool_lock():
        spare = pool_count("free") - pool_count("resv")
        need(spare <= 64, f"{spare} free huge pages would have to be used up")
        with Mapping.memfd((spare + 1) * HUGE, hugepage_size=HUGE, reserve=False) as region:
            uffd.register(region)
            for index in range(spare):
                uffd.copy(region.page(index), bytes(HUGE))
            handler = FaultHandler(uffd, [Served(region, BufferSource(b"h" * region.length))])
            handler.start()
            sleeper = loading(region.page(spare))
            with pytest.raises(HugepagePoolEmpty) as caught:
                handler.join(TIMEOUT_S)
            assert caught.value.address == region.page(spare)
            assert not sleeper.finished
            assert [o.address for o in handler.pending.outstanding()] == [region.page(spare)]
            grown = grow_pool(1)
            try:
                need(grown == 1, "no memory for one huge page")
                handler.start()
                assert sleeper.join() == ord("h")
                handler.close()
                assert len(handler.pending) == 0
            finally:
                grow_pool(-grown)


def test_a_truncated_source_file_is_an_error_not_a_crash(
    uffd: Userfaultfd, region: Mapping
) -> None:
    uffd.register(region)
    fd = file_with(pattern(region, 0, 4))
    handler = FaultHandler(uffd, [Served(region, FileSource(fd))])
    os.ftruncate(fd, PAGE)
    handler.start()
    assert region.load(0) == 1
    sleeper = loading(region.page(2))
    with pytest.raises(UffdError) as caught:
        handler.join(TIMEOUT_S)
    assert caught.value.errno == errno.EFAULT
    assert caught.value.address == region.page(2)
    os.ftruncate(fd, region.length)
    handler.start()
    assert sleeper.join() == 0
    handler.close()
    os.close(fd)


def test_stopping_leaves_sleepers_to_the_next_reader(uffd: Userfaultfd, region: Mapping) -> None:
    uffd.register(region)
    handler = FaultHandler(uffd, [])
    handler.start()
    with pytest.raises(ValueError, match="running"):
        handler.start()
    handler.stop()
    assert not handler.is_running
    handler.close()
    with pytest.raises(ValueError, match="closed"):
        handler.statistics()
    sleeper = loading(region.address)
    assert next_fault(uffd).address == region.address
    assert not is_resident(region.address, PAGE)
    with FaultHandler(uffd, [Served(region, ZeroSource())]):  # its message was read, by us
        assert sleeper.join() == 0


def test_impossible_geometry_is_refused(uffd: Userfaultfd, region: Mapping) -> None:
    for served in (
        Served(region, ZeroSource(), unit=PAGE + 1),
        Served(region, ZeroSource(), page_size=PAGE * 8),
        Served(region, ZeroSource(), page_size=1000),
    ):
        with pytest.raises(UffdError) as caught:
            FaultHandler(uffd, [served])
        assert caught.value.errno == errno.EINVAL


def test_a_blocking_context_is_refused(region: Mapping) -> None:
    with Userfaultfd.open(nonblocking=False) as uffd:
        uffd.register(region)
        handler = FaultHandler(uffd, [Served(region, ZeroSource())])
        handler.start()
        with pytest.raises(UffdError) as caught:
            handler.join(TIMEOUT_S)
        assert caught.value.errno == errno.EBADF
        handler.close()
