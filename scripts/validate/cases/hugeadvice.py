"""Advice on huge pages of a pool: what it frees, what it refuses, and the pool's counters."""

import threading
from collections.abc import Callable

from guestmem.pools import HugepagePool, PoolState
from scripts.validate.bench import Bench, present
from scripts.validate.case import case
from scripts.validate.check import CheckFailed, expect, refused, same
from scripts.validate.kinds import HUGE, PAGE, pattern
from uffd import Advice, Mapping, Mode, madvise, mincore, touch

_BOTH = ("hugetlb", "hugetlb-private")
_ROUNDS = 5


def _state() -> PoolState:
    return HugepagePool(HUGE).state()


def _undisturbed(body: Callable[[], None]) -> None:
    """The pool's counters are everybody's: others on this host may change them meanwhile. A page
    that is really lost is lost every time, so one quiet round is proof.
    """
    for _ in range(_ROUNDS - 1):
        try:
            return body()
        except CheckFailed:
            continue
    return body()


@case("advice", on=_BOTH, name="hugetlb-arguments")
def hugetlb_arguments(bench: Bench) -> None:
    """DONTNEED refuses a start that is not aligned to the huge page; a length of zero is
    nothing; both leave the contents.
    """
    memory = bench.map(2)
    memory.write(0, pattern(memory))
    with refused(22, what="DONTNEED at a start that is not aligned"):
        madvise(memory.address + PAGE, HUGE, Advice.DONTNEED)
    madvise(memory.address, 0, Advice.DONTNEED)
    madvise(memory.address, 0, Advice.REMOVE)
    same(memory.read(0, memory.length), pattern(memory), "contents")


@case("advice", on=["hugetlb"], name="hugetlb-remove-part")
def hugetlb_remove_part(bench: Bench) -> None:
    """REMOVE of a range that is not aligned zeroes the parts in place and frees no page."""
    memory = bench.map(2)
    memory.write(0, pattern(memory))
    madvise(memory.address + PAGE, 2 * PAGE, Advice.REMOVE)
    expected = bytearray(pattern(memory))
    expected[PAGE : 3 * PAGE] = bytes(2 * PAGE)
    same(present(memory), [True, True], "pages mapped")
    same(memory.read(0, memory.length), bytes(expected), "contents")


@case("advice", on=_BOTH, name="hugetlb-dontneed")
def hugetlb_dontneed(bench: Bench) -> None:
    """DONTNEED empties a private mapping and unmaps a shared one, whose data stays; the others of
    the mapping stay as they were.
    """
    memory = bench.map(3)
    memory.write(0, pattern(memory))
    memory.advise(Advice.DONTNEED, HUGE, HUGE)
    same(present(memory), [True, False, True], "pages mapped")
    expected = pattern(memory, 1, 1) if memory.is_shared else bytes(HUGE)
    same(memory.read(HUGE, HUGE), expected, "contents of the page")
    bench.holds(memory, 0, pattern(memory, 0, 1))
    bench.holds(memory, 2, pattern(memory, 2, 1))


@case("advice", on=["hugetlb"], name="hugetlb-remove")
def hugetlb_remove(bench: Bench) -> None:
    """REMOVE takes the pages out of the file, for every mapping of it."""
    memory = bench.map(2)
    alias = memory.alias()
    memory.write(0, pattern(memory))
    memory.advise(Advice.REMOVE, 0, HUGE)
    same(alias.read(0, 64), bytes(64), "contents through the other mapping")
    same(alias.read(HUGE, HUGE), pattern(memory, 1, 1), "contents of the page that was kept")


@case("advice", on=_BOTH, name="hugetlb-counters")
def hugetlb_counters(bench: Bench) -> None:
    """Free and reserved pages of the pool are back where they were after mapping, writing,
    emptying and unmapping.
    """
    _undisturbed(lambda: _count_pages(bench))


def _count_pages(bench: Bench) -> None:
    before = _state()
    memory = bench.map(4)
    same(_state().available, before.available - 4, "available once mapped (reserved)")
    memory.write(0, pattern(memory))
    same(_state().free, before.free - 4, "free once written")
    memory.advise(Advice.REMOVE if memory.is_shared else Advice.DONTNEED)
    same(_state().free, before.free, "free once emptied")
    memory.store(0, 1)
    memory.close()
    after = _state()
    same((after.free, after.reserved), (before.free, before.reserved), "free and reserved")


@case("advice", on=_BOTH, name="hugetlb-refused")
def hugetlb_refused(bench: Bench) -> None:
    """FREE, COLD, PAGEOUT and COLLAPSE are refused; POPULATE, DONTFORK and HUGEPAGE are taken."""
    memory = bench.map(1)
    for advice in (Advice.FREE, Advice.COLD, Advice.PAGEOUT, Advice.COLLAPSE):
        with refused(22, what=advice.name):
            memory.advise(advice)
    taken = (Advice.POPULATE_WRITE, Advice.POPULATE_READ, Advice.DONTFORK, Advice.HUGEPAGE)
    for advice in taken:
        memory.advise(advice)
    same(present(memory), [True], "page mapped")


@case("advice", on=_BOTH, name="fault-after-advice", timeout_s=30)
def fault_after_advice(bench: Bench) -> None:
    """DONTNEED races with faults in the same pages, over and over: no fault ever fails for want of
    a page, reservations are right at the end.
    """
    _undisturbed(lambda: _fault_and_advise(bench))


def _fault_and_advise(bench: Bench) -> None:
    before = _state()
    memory = bench.map(4)
    rounds = 100
    failures: list[BaseException] = []

    def fault() -> None:
        try:
            for i in range(rounds * 4):
                with touch.guarded_accesses():
                    touch.guarded_store(memory.page(i % 4), 1)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=fault, daemon=True)
    thread.start()
    for _ in range(rounds):
        memory.advise(Advice.DONTNEED)
    thread.join()
    same(failures, [], "failed accesses")
    memory.close()
    after = _state()
    same((after.free, after.reserved), (before.free, before.reserved), "free and reserved")


@case("advice", on=_BOTH, name="advice-against-mapping", timeout_s=30)
def advice_against_mapping(bench: Bench) -> None:
    """DONTNEED races with unmapping and mapping the same pages anew: every new mapping gets its
    pages.
    """
    _undisturbed(lambda: _map_and_advise(bench))


def _map_and_advise(bench: Bench) -> None:
    before = _state()
    rounds = 30
    over = threading.Event()
    current: list[Mapping] = [bench.map(2)]

    def empty() -> None:
        while not over.is_set():
            memory = current[0]
            try:
                madvise(memory.address, 2 * HUGE, Advice.DONTNEED)
            except OSError:
                continue  # just unmapped

    thread = threading.Thread(target=empty, daemon=True)
    thread.start()
    for _ in range(rounds):
        memory = bench.map(2)
        old, current[0] = current[0], memory
        with touch.guarded_accesses():
            touch.guarded_store(memory.address, 1)
            touch.guarded_store(memory.page(1), 1)
        old.close()
    over.set()
    thread.join()
    current[0].close()
    after = _state()
    same((after.free, after.reserved), (before.free, before.reserved), "free and reserved")


@case("advice", on=["anon", "shmem"], name="on-registered")
def on_registered(bench: Bench) -> None:
    """Advice on a registered range is taken and changes no contents; what it empties is missing
    again.
    """
    uffd, memory = bench.registered(Mode.MISSING)
    uffd.copy(memory.address, pattern(memory))
    harmless = (Advice.COLD, Advice.NOHUGEPAGE, Advice.HUGEPAGE, Advice.DONTFORK, Advice.DONTDUMP)
    for advice in (*harmless, Advice.MERGEABLE):
        memory.advise(advice)
    same(memory.read(0, memory.length), pattern(memory), "contents")
    memory.advise(Advice.REMOVE if memory.is_shared else Advice.DONTNEED, 0, PAGE)
    same(mincore(memory.address, 2 * PAGE), b"\0\1", "resident pages")
    with refused(17, what="COPY to the page that stayed"):
        uffd.copy(memory.page(1), pattern(memory, 1, 1))
    expect(uffd.copy(memory.address, pattern(memory, 0, 1)) == PAGE, "COPY to the emptied page")
