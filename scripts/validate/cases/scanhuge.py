"""PAGEMAP_SCAN: huge pages whole and in parts, single pages through mprotect, and races."""

import mmap
import threading

from scripts.validate import folios
from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.cases.scanargs import ASYNC
from scripts.validate.check import Skipped, expect, same
from scripts.validate.host import thp
from scripts.validate.kinds import ANON, HUGE, PAGE, aligned
from scripts.validate.tracking import CHECK, PRESENT, PROTECT, Tracked, open_tracking
from uffd import Advice, Category, Mapping, Mode, Pagemap, touch

_HALF = HUGE // PAGE // 2
_ALL = HUGE // PAGE


def _huge(pages: int = 1) -> Tracked:
    """Anonymous huge pages, mapped whole, tracked and clean."""
    memory = aligned(pages * HUGE, HUGE)
    memory.advise(Advice.HUGEPAGE)
    tracked = Tracked.of(memory)
    if folios.anon_huge_bytes(memory.address) < pages * HUGE:
        raise Skipped("the kernel found no huge page", "echo 1 > /proc/sys/vm/compact_memory")
    return tracked


def _rewritten() -> Tracked:
    """One that was written all over after it was protected (split by the first write or not)."""
    tracked = _huge()
    tracked.write(*range(_ALL))
    return tracked


@case("scan", needs=[ASYNC, thp()], name="huge-new")
def huge_new(bench: Bench) -> None:
    """A new huge page counts as written whole, and is shown as HUGE."""
    memory = aligned(HUGE, HUGE)
    memory.advise(Advice.HUGEPAGE)
    touch.fill(memory.address, 1, HUGE)
    tracked = _untouched(memory)
    tracked.expect_written([(0, _ALL)], "written pages")
    result = tracked.scan(mask=PRESENT, returned=Category.HUGE)
    if folios.anon_huge_bytes(memory.address):
        same([r.categories for r in result.regions], [Category.HUGE], "categories")


def _untouched(memory: Mapping) -> Tracked:
    """Registered, but not yet protected."""
    uffd = open_tracking()
    uffd.register(memory, Mode.WP)
    return Tracked(uffd, Pagemap(), memory.address, memory.length, memory.page_size)


@case("scan", needs=[ASYNC, thp()], name="huge-written")
def huge_written(bench: Bench) -> None:
    """Protected and written all over: written whole."""
    _rewritten().expect_written([(0, _ALL)], "written pages")


@case("scan", needs=[ASYNC, thp()], name="huge-cleared")
def huge_cleared(bench: Bench) -> None:
    """Get-and-protect of the whole: clean, still one huge page if it was one before."""
    tracked = _huge()
    tracked.expect_written([], "written pages")
    same(folios.anon_huge_bytes(tracked.address), HUGE, "mapped by a huge page")
    tracked.write(0)
    expect(tracked.written(PROTECT | CHECK), "something was written")
    tracked.expect_written([], "second look")


@case("scan", needs=[ASYNC, thp()], name="huge-middle")
def huge_middle(bench: Bench) -> None:
    """Only the middle page of a protected huge page written: that page, the rest stays clean."""
    tracked = _huge()
    tracked.write(_HALF)
    tracked.expect_written([(_HALF, _HALF + 1)], "written pages")


@case("scan", on=["first", "second"], needs=[ASYNC, thp()], name="huge-clear-half")
def huge_clear_half(bench: Bench) -> None:
    """Protecting one half of a written huge page leaves the other half written."""
    tracked = _rewritten()
    start, end = (0, _HALF) if bench.variant == "first" else (_HALF, _ALL)
    result = tracked.scan(flags=PROTECT, start=start, end=end)
    same(tracked.runs(result), [(start, end)], "the half that was asked for")
    other = (_HALF, _ALL) if bench.variant == "first" else (0, _HALF)
    tracked.expect_written([other], "the other half")


@case("scan", on=["first", "second"], needs=[ASYNC, thp()], name="huge-clear-half-limited")
def huge_clear_half_limited(bench: Bench) -> None:
    """The same by max_pages: only what was returned is protected."""
    tracked = _rewritten()
    start = 0 if bench.variant == "first" else _HALF
    result = tracked.scan(flags=PROTECT, start=start, max_pages=_HALF)
    same(tracked.runs(result), [(start, start + _HALF)], "as many pages as asked for")
    other = (_HALF, _ALL) if bench.variant == "first" else (0, _HALF)
    tracked.expect_written([other], "the other half")


@case("scan", needs=[ASYNC, thp()], name="huge-read-half")
def huge_read_half(bench: Bench) -> None:
    """Looking at half of a written huge page returns that half and changes nothing."""
    tracked = _rewritten()
    same(tracked.runs(tracked.scan(end=_HALF)), [(0, _HALF)], "half")
    tracked.expect_written([(0, _ALL)], "the whole")


@case("scan", needs=[ASYNC], name="mprotect")
def mprotect(bench: Bench) -> None:
    """Clean pages stay clean through mprotect to read-only and back, written ones written; a page
    written afterwards counts; mremap makes everything written again.
    """
    memory = ANON.map(4)
    tracked = Tracked.of(memory)
    tracked.write(1)
    memory.protect(mmap.PROT_READ)
    tracked.expect_written([(1, 2)], "while read-only")
    memory.protect(mmap.PROT_READ | mmap.PROT_WRITE)
    tracked.expect_written([(1, 2)], "writable again")
    tracked.write(2)
    tracked.expect_written([(1, 3)], "after another write")
    same(tracked.written(PROTECT), [(1, 3)], "get and protect")
    tracked.expect_written([], "clean")


@case("scan", needs=[ASYNC], name="remap")
def remap(bench: Bench) -> None:
    """A single page, written, protected, mapped anew at its place: a new page is written by its
    first store, and not before it is registered again.
    """
    memory = ANON.map(1)
    tracked = Tracked.of(memory)
    tracked.expect_written([], "clean")
    memory.advise(Advice.DONTNEED)
    tracked.expect_written([(0, 1)], "emptied: what was there is gone, so it counts as written")
    same(tracked.written(PROTECT), [(0, 1)], "get and protect a hole")
    tracked.expect_written([], "clean hole")
    tracked.write(0)
    tracked.expect_written([(0, 1)], "written again")


@case("scan", on=["whole", "checked", "in parts"], needs=[ASYNC], name="transactions", timeout_s=40)
def transactions(bench: Bench) -> None:
    """A thread writes all pages over and over while get-and-protect runs: no write is lost. What
    the last round finds and all earlier ones found covers every page that holds the last value.
    """
    pages, rounds = 32, 40
    tracked = Tracked.of(ANON.map(pages))
    over = threading.Event()

    def write() -> None:
        for value in range(1, rounds + 1):
            for index in range(pages):
                touch.store(tracked.at(index), value)
        over.set()

    copies = {index: touch.load(tracked.at(index)) for index in range(pages)}
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    flags = PROTECT | CHECK if bench.variant == "checked" else PROTECT
    limit = 5 if bench.variant == "in parts" else 0
    is_last = False
    while True:
        at = 0
        while at < pages:
            result = tracked.scan(flags=flags, start=at, max_pages=limit)
            for first, last in tracked.runs(result):
                for index in range(first, last):
                    copies[index] = touch.load(tracked.at(index))
            at = (result.walk_end - tracked.address) // tracked.page
        if is_last:
            break
        is_last = over.is_set()
    thread.join()
    same(copies, dict.fromkeys(range(pages), rounds), "copies after the last round")
