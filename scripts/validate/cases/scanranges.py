"""PAGEMAP_SCAN over holes, unregistered and synchronously registered ranges, and zero pages."""

from scripts.validate import folios, raw
from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.cases.scanargs import ASYNC
from scripts.validate.check import expect, same
from scripts.validate.host import thp
from scripts.validate.kinds import ANON, HUGE, PAGE, aligned
from scripts.validate.tracking import PROTECT, Tracked, open_tracking
from uffd import Advice, Category, Mode, Pagemap, touch

_ALL = Category.WPALLOWED | Category.WRITTEN | Category.PRESENT | Category.PFNZERO | Category.HUGE


@case("scan", needs=[ASYNC], name="unmapped-hole")
def unmapped_hole(bench: Bench) -> None:
    """A hole in the address space inside the range is skipped; the walk goes on to the end."""
    tracked = Tracked.of(ANON.map(6))
    tracked.write(*range(6))
    same(raw.unmap(tracked.at(2), 2 * PAGE), 0, "munmap")
    result = tracked.scan()
    same(tracked.runs(result), [(0, 2), (4, 6)], "written pages around the hole")
    same(result.walk_end, tracked.end, "end of the walk")


@case("scan", needs=[ASYNC], name="plain-userfaultfd")
def plain_userfaultfd(bench: Bench) -> None:
    """In a synchronously registered range PRESENT is shown, WPALLOWED is not, and the scan
    protects nothing.
    """
    memory, uffd = ANON.map(2), bench.open()
    touch.fill(memory.address, 1, memory.length)
    uffd.register(memory, Mode.WP)
    end = memory.address + memory.length
    with Pagemap() as pagemap:
        shown = Category.PRESENT | Category.WPALLOWED
        result = pagemap.scan(memory.address, end, returned=shown)
        same([r.categories for r in result.regions], [Category.PRESENT], "categories")
        result = pagemap.scan(memory.address, end, returned=shown, flags=PROTECT)
        same(result.regions, (), "regions of a protecting scan, which leaves such ranges out")
    memory.store(0, 2)  # would sleep for ever if the scan had protected it
    same(memory.load(0), 2, "byte written")


def _categories(tracked: Tracked) -> list[Category]:
    return [r.categories for r in tracked.scan(mask=Category.NONE, returned=_ALL).regions]


@case("scan", needs=[ASYNC], name="zero-pages")
def zero_pages(bench: Bench) -> None:
    """Pages only read are PFNZERO, also protected; a write makes them ordinary."""
    memory = ANON.map(4)
    for i in range(4):
        memory.load(i * PAGE)
    tracked = Tracked.of(memory, populate=False)
    clean = Category.WPALLOWED | Category.PRESENT | Category.PFNZERO
    same(_categories(tracked), [clean], "categories of zero pages")
    tracked.write(1)
    written = Category.WPALLOWED | Category.PRESENT | Category.WRITTEN
    same(_categories(tracked), [clean, written, clean], "after a write")


@case("scan", needs=[ASYNC, thp()], name="zero-pages-huge")
def zero_pages_huge(bench: Bench) -> None:
    """The huge zero page: PFNZERO for its whole length, clean once protected, and one written page
    is all that is written.
    """
    memory = aligned(HUGE, HUGE)
    memory.advise(Advice.HUGEPAGE)
    memory.load(0)
    tracked = Tracked.of(memory, populate=False)
    result = tracked.scan(mask=Category.PFNZERO, returned=Category.PFNZERO)
    covered = sum(r.length for r in result.regions)
    expect(covered in (PAGE, HUGE), f"the zero page covers a page or a huge page ({covered:#x})")
    tracked.expect_written([], "written pages")
    tracked.write(7)
    tracked.expect_written([(7, 8)], "written pages after a store")
    bench.remark(f"a read of an advised range maps {covered >> 10} KiB of zeros")


@case("scan", needs=[ASYNC], name="never-populated")
def never_populated(bench: Bench) -> None:
    """Never-touched pages of a tracked range can be protected: clean and absent; the first write
    is seen.
    """
    tracked = Tracked.of(ANON.map(8), populate=False)
    tracked.expect_written([], "written pages")
    same(tracked.runs(tracked.scan(mask=Category.PRESENT)), [], "present pages")
    tracked.write(5)
    tracked.expect_written([(5, 6)], "written pages after a store")
    same(tracked.runs(tracked.scan(mask=Category.PRESENT)), [(5, 6)], "present pages")


@case("scan", needs=[ASYNC, thp()], name="never-populated-huge")
def never_populated_huge(bench: Bench) -> None:
    """The same where huge pages are advised: the clean marks of the other pages are kept."""
    memory = aligned(HUGE, HUGE)
    memory.advise(Advice.HUGEPAGE)
    tracked = Tracked.of(memory, populate=False)
    tracked.expect_written([], "written pages")
    tracked.write(9)
    tracked.expect_written([(9, 10)], "written pages after a store")
    same(folios.anon_huge_bytes(memory.address), 0, "mapped by huge pages")


@case("scan", needs=[ASYNC, thp()], name="never-populated-huge-unprotected")
def never_populated_huge_unprotected(bench: Bench) -> None:
    """Registered but not protected: the first write brings a huge page, all of it written."""
    memory = aligned(HUGE, HUGE)
    memory.advise(Advice.HUGEPAGE)
    uffd = open_tracking()
    uffd.register(memory, Mode.WP)
    tracked = Tracked(uffd, Pagemap(), memory.address, memory.length)
    tracked.write(0)
    tracked.expect_written([(0, HUGE // PAGE)], "written pages")
