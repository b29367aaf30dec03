"""PAGEMAP_SCAN: get what was written and protect it again, in whatever portions."""

from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.cases.scanargs import ASYNC
from scripts.validate.check import expect, same
from scripts.validate.kinds import ANON
from scripts.validate.tracking import CHECK, PROTECT, Tracked
from uffd import touch

_PAGES = 32
_GET = PROTECT | CHECK


def _tracked(pages: int = _PAGES) -> Tracked:
    return Tracked.of(ANON.map(pages))


@case("scan", needs=[ASYNC], name="larger-vector")
def larger_vector(bench: Bench) -> None:
    """A vector longer than needed: one region for all written pages, and clean afterwards."""
    tracked = _tracked()
    tracked.write(*range(_PAGES))
    same(tracked.written(_GET), [(0, _PAGES)], "first look")
    tracked.expect_written([], "second look")


@case("scan", needs=[ASYNC], name="alternating")
def alternating(bench: Bench) -> None:
    """Every other page written: a region each, in order, exactly those."""
    tracked = _tracked()
    tracked.write(*range(0, _PAGES, 2))
    expected = [(i, i + 1) for i in range(0, _PAGES, 2)]
    same(tracked.written(_GET), expected, "first look")
    tracked.expect_written([], "second look")


@case("scan", on=["1", "2", "3", "7", "16", "1000"], needs=[ASYNC], name="in-parts")
def in_parts(bench: Bench) -> None:
    """With vectors of this length the parts together are exactly what was written, each page
    once; walk_end is where to go on.
    """
    tracked = _tracked()
    tracked.write(*range(1, _PAGES, 2))
    found: list[tuple[int, int]] = []
    start = 0
    for _ in range(_PAGES + 1):
        result = tracked.scan(flags=_GET, max_regions=int(bench.variant), start=start)
        found += tracked.runs(result)
        expect(len(result.regions) <= int(bench.variant), "no more regions than the vector has")
        start = (result.walk_end - tracked.address) // tracked.page
        if result.walk_end == tracked.end:
            break
    same(found, [(i, i + 1) for i in range(1, _PAGES, 2)], "all parts")
    tracked.expect_written([], "second look")


@case("scan", needs=[ASYNC], name="max-pages")
def max_pages(bench: Bench) -> None:
    """max_pages counts pages, not regions; only what was returned is protected."""
    tracked = _tracked()
    tracked.write(*range(_PAGES))
    result = tracked.scan(flags=_GET, max_pages=10)
    same(tracked.runs(result), [(0, 10)], "first ten")
    same(result.walk_end, tracked.at(10), "where the walk stopped")
    tracked.expect_written([(10, _PAGES)], "what is left")


@case("scan", needs=[ASYNC], name="get-and-clear-two")
def get_and_clear_two(bench: Bench) -> None:
    """Two pages of a longer run: exactly these are clean afterwards."""
    tracked = _tracked()
    tracked.write(*range(4, 20))
    same(tracked.runs(tracked.scan(flags=_GET, max_pages=2)), [(4, 6)], "two pages")
    tracked.expect_written([(6, 20)], "the others")


@case("scan", needs=[ASYNC], name="two-regions")
def two_regions(bench: Bench) -> None:
    """Two written runs with a gap, the vector of one: the second stays written."""
    tracked = _tracked()
    tracked.write(*range(2, 6), *range(10, 12))
    same(tracked.runs(tracked.scan(flags=_GET, max_regions=1)), [(2, 6)], "first region")
    tracked.expect_written([(10, 12)], "what is left")
    same(tracked.written(_GET), [(10, 12)], "second region")
    tracked.expect_written([], "nothing is left")


@case("scan", needs=[ASYNC], name="small-vector")
def small_vector(bench: Bench) -> None:
    """A vector of one with max_pages of one: page after page."""
    tracked = _tracked(4)
    tracked.write(0, 1, 3)
    for expected in ([(0, 1)], [(1, 2)], [(3, 4)], []):
        result = tracked.scan(flags=_GET, max_regions=1, max_pages=1)
        same(tracked.runs(result), expected, "one page at a time")


@case("scan", needs=[ASYNC], name="look-without-protecting")
def look_without_protecting(bench: Bench) -> None:
    """Looking changes nothing; rewriting a written page changes nothing; reading is no writing."""
    tracked = _tracked(8)
    tracked.write(3)
    for _ in range(2):
        tracked.expect_written([(3, 4)], "looking twice")
    tracked.write(3)
    touch.read(tracked.address, tracked.length)
    tracked.expect_written([(3, 4)], "after rewriting it and reading all")
