"""PAGEMAP_SCAN: where it says that it stopped."""

from scripts.validate.bench import Bench
from scripts.validate.case import case
from scripts.validate.cases.scanargs import ASYNC
from scripts.validate.check import same
from scripts.validate.kinds import ANON
from scripts.validate.tracking import PROTECT, Tracked
from uffd import ScanFlag

_PAGES = 16
# (max_regions, max_pages, how many granules the walk covers: dense, sparse) when all, or every
# other page (from the first on), is written. The walk stops at the first match that has no room
# any more, not behind the last one that had.
_LIMITS: dict[str, tuple[int, int, int, int]] = {
    "big vector": (1000, 0, _PAGES, _PAGES),
    "vector of one": (1, 0, _PAGES, 2),
    "vector that just fits": (_PAGES // 2, 0, _PAGES, _PAGES),
    "max_pages all": (1000, _PAGES, _PAGES, _PAGES),
    "max_pages half": (1000, _PAGES // 2, _PAGES // 2, _PAGES),
    "max_pages one": (1000, 1, 1, 2),
    "vector of one, max_pages one": (1, 1, 1, 2),
}


def _stops(tracked: Tracked, limit: str, dense: bool, flags: ScanFlag) -> None:
    regions, pages, when_dense, when_sparse = _LIMITS[limit]
    step = 1 if dense else 2
    tracked.protect()
    tracked.write(*range(0, _PAGES, step))
    result = tracked.scan(flags=flags, max_regions=regions, max_pages=pages)
    stopped = (result.walk_end - tracked.address) / tracked.page
    expected = when_dense if dense else when_sparse
    same(stopped, expected, f"{limit}, {'dense' if dense else 'sparse'}, flags {int(flags)}")


@case("scan", on=_LIMITS, needs=[ASYNC], name="walk-end")
def walk_end(bench: Bench) -> None:
    """With these limits, dense and sparse, looking and protecting, the walk stops at the first
    match that has no room, or at the asked end.
    """
    tracked = Tracked.of(ANON.map(_PAGES))
    for dense in (True, False):
        for flags in (ScanFlag.NONE, PROTECT):
            _stops(tracked, bench.variant, dense, flags)


@case("scan", needs=[ASYNC], name="walk-end-empty")
def walk_end_empty(bench: Bench) -> None:
    """Of an empty range, of one with nothing written, and of one protected without a buffer the
    end is the asked end.
    """
    tracked = Tracked.of(ANON.map(_PAGES))
    result = tracked.scan(end=0)
    same((result.regions, result.walk_end), ((), tracked.address), "empty range")
    result = tracked.scan(end=0, flags=PROTECT)
    same(result.walk_end, tracked.address, "empty range, protecting")
    for flags in (ScanFlag.NONE, PROTECT):
        result = tracked.scan(flags=flags)
        same((result.regions, result.walk_end), ((), tracked.end), "nothing written")
    tracked.write(*range(_PAGES))
    result = tracked.scan(flags=PROTECT, max_regions=0)
    same((result.regions, result.walk_end), ((), tracked.end), "protecting without a buffer")
    tracked.expect_written([], "all protected")
